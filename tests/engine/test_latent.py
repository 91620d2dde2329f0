"""DeepSeek's latent attention computes what transformers' own classes compute, in whatever steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.request import SamplingParams
from kvferry.engine.engine import Engine
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig

from ..deepseek import EXPERTS, TOKEN_SIZE, YARN, Generation, write_deepseek
from ..engine_driver import Driver, make_engine
from ..kvcache.test_host_slots import swapped_in_the_middle, undisturbed
from .ranks.test_group import RankPair
from .transformers_reference import greedy_tokens

NUM_TOKENS = 8
SURE_GAP = 1e-3  # between two logits
BLOCK = 32  # outputs and inputs that share a scale
VARIANTS: dict[str, tuple[Generation, dict[str, object]]] = {
    "v3": ("v3", {}),
    "v3 without a rank of queries": ("v3", {"q_lora_rank": None}),
    "v3 biased, pairs half a head apart": ("v3", {"attention_bias": True, "rope_interleave": False}),
    "v3 yarn": ("v3", {"rope_parameters": YARN}),
    "v3 in C++": ("v3", {"qk_rope_head_dim": 16, "v_head_dim": 32}),
    "v3 with experts": ("v3", EXPERTS["v3"]),
    "glm4 lite": ("glm4 lite", {"routed_scaling_factor": 1.8}),
    "youtu": ("youtu", {"tie_word_embeddings": True}),
    "mistral 4, its queries grow": ("mistral4", EXPERTS["mistral4"]),
    "v2": ("v2", {}),
    "v2 with experts": ("v2", EXPERTS["v2"]),
    "v2 lite, biased, yarn": (
        "v2",
        {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    ),
}


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 512, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (generation, fields) in VARIANTS.items():
        write_deepseek(root / name, generation, **fields)  # type: ignore[arg-type]
    return root


def _assert_as_transformers(model_dir: Path, asked: list[list[int]], answers: list[list[int]]) -> None:
    """Answers are the greedy tokens, each of which leads by more than SURE_GAP."""
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        assert answer == greedy_tokens(model_dir, prompt, answer, SURE_GAP), f"prompt of {len(prompt)} tokens"


def _answers(engine: Engine, asked: list[list[int]], chunk: int) -> list[list[int]]:
    driver = Driver(engine)
    return driver.generate([driver.add(prompt) for prompt in asked], chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    engine = make_engine(checkpoints / variant)
    asked = prompts([1, 15, 16, 17, 70, 300])
    expected = _answers(engine, asked, 10**9)
    _assert_as_transformers(checkpoints / variant, asked, expected)
    for chunk in (16, 7):
        assert _answers(engine, asked, chunk) == expected
    assert _answers(make_engine(checkpoints / variant, deterministic=True), asked, 33) == expected


def test_a_page_has_one_latent_of_each_token_and_its_files_are_those_of_the_config(checkpoints: Path) -> None:
    for variant in VARIANTS:
        check_checkpoint(checkpoints / variant, ModelConfig.from_dir(checkpoints / variant))
    engine = make_engine(checkpoints / "v3", num_blocks=8)
    assert tuple(engine.kv_pages.shape) == (3, 8, 1, 1, 16, TOKEN_SIZE)
    assert engine.spec.block_bytes() == 3 * TOKEN_SIZE * 16 * 4 == engine.spec.block_bytes(tp_size=2)
    assert engine.spec.layout == "latent" and engine.spec.fits_ranks(3)


def test_a_block_that_is_shared_copied_or_swapped_says_the_same(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "v3", swap_space=8 * 3 * TOKEN_SIZE * 16 * 4)
    (prompt,) = prompts([20])
    driver = Driver(engine)
    first = driver.add(prompt)
    driver.generate([first])
    assert driver.step_fork(first) == driver.step([(first, 1)])[0][0].token_id
    assert swapped_in_the_middle(engine) == undisturbed(engine)


def test_what_an_earlier_owner_left_behind_a_rows_end_does_not_matter(checkpoints: Path) -> None:
    for deterministic in (False, True):
        engine = make_engine(checkpoints / "v3", deterministic=deterministic)
        clean = _answers(engine, prompts([5, 17, 30]), 16)
        engine.kv_pages.fill_(float("nan"))
        assert _answers(engine, prompts([5, 17, 30]), 16) == clean


def test_exact_results_are_the_same_bits_in_any_company_and_chunks(checkpoints: Path) -> None:
    told = set()
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
    for company, chunk in ((0, 10**9), (3, 16), (5, 7)):
        driver = Driver(make_engine(checkpoints / "v2", deterministic=True))
        first, *others = (driver.add(prompt, sampling) for prompt in prompts([40, 9, 33, 64, 2, 50])[: company + 1])
        found = []
        while first.num_output_tokens < 6:
            running = [seq for seq in (first, *others) if seq.num_output_tokens < 6]
            tokens = driver.step([(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in running])[0]
            found += [(token.token_id, token.logprob) for token in tokens]
        told.add(tuple(found))
    assert len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3", "v3 with experts"])
def test_two_ranks_say_what_one_says_and_each_has_all_latents(checkpoints: Path, name: str) -> None:
    """Experts' tokens are exchanged: each rank then has the shared one whole."""
    exchange = {"enable_expert_parallel": True, "expert_exchange": "all_to_all"} if name != "v3" else {}
    pair = RankPair(checkpoints / name, **exchange)
    try:
        assert pair.received() == b"made this with 1 heads of 1"
        asked = prompts([1, 20, 33, 130])
        _assert_as_transformers(checkpoints / name, asked, _answers(pair.engine, asked, 16))
        assert pair.engine.spec.fingerprint == make_engine(checkpoints / name).spec.fingerprint
        assert swapped_in_the_middle(pair.engine) == undisturbed(make_engine(checkpoints / name))
    finally:
        pair.group.close()


@pytest.mark.parametrize("variant", ["v3", "v3 with experts"])
def test_weights_in_8_bit_blocks_say_what_the_numbers_that_they_stand_for_say(
    checkpoints: Path, tmp_path: Path, variant: str
) -> None:
    """Rows of blocks may be cut short, as those of `kv_a_proj_with_mqa` are in the large models; gates are plain."""
    source, narrow, plain = checkpoints / variant, tmp_path / "narrow", tmp_path / "plain"
    tensors = load_file(source / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    for name, matrix in tensors.items():
        if name.endswith(("_proj.weight", "_mqa.weight")):
            numbers, scales = _narrowed(matrix)
            stored[name], stored[f"{name}_scale_inv"] = numbers, scales
            wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            meant[name] = numbers.float() * wide[: matrix.shape[0], : matrix.shape[1]]
    stored["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)  # of the layer that predicts a further token
    for path, contents in ((narrow, stored), (plain, meant)):
        path.mkdir()
        config = json.loads((source / "config.json").read_text())
        if path is narrow:
            config["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
            }
        (path / "config.json").write_text(json.dumps(config))
        save_file(contents, path / "model.safetensors")
    asked = prompts([1, 20, 70])
    assert _answers(make_engine(narrow), asked, 16) == _answers(make_engine(plain), asked, 16)


def _narrowed(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers in 8 bits, and a scale for each block."""
    rows, columns = (-(-size // BLOCK) for size in matrix.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    largest = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3))
    scales = largest / 448
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (matrix / wide[: matrix.shape[0], : matrix.shape[1]]).to(torch.float8_e4m3fn), scales
