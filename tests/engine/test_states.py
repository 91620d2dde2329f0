"""Layers that keep a state compute what transformers' own classes compute, in whatever steps and blocks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
import transformers

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.errors import ConfigError
from kvferry.engine.engine import Engine
from kvferry.engine.nn.states import ForeignStateError
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig

from ..adapters import merge, write_adapter
from ..engine_driver import GREEDY, Driver, engine_config, make_engine
from ..kvcache.test_host_slots import swapped_in_the_middle, undisturbed
from ..transformers_checkpoints import (
    FALCON_H1,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    SMALL,
    STATES,
    write_model,
    write_state_models,
)
from .test_adapters import put, sequence
from .transformers_reference import reference_logprobs

NUM_TOKENS = 17  # past the end of a block
NEAR = 1e-3  # logits that a rounding may bring into the other order
EXPERTS: dict[str, object] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
LFM2: dict[str, object] = {
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "block_multiple_of": 16,
    "intermediate_size": 150,
    "conv_bias": True,
}
MAMBA: dict[str, object] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "shared_intermediate_size": 48,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3.5": ("Qwen3_5Text", {}),
    "qwen3.5, as many keys as values": ("Qwen3_5Text", {"linear_num_key_heads": 4, "linear_value_head_dim": 32}),
    "qwen3.5, a longer convolution": ("Qwen3_5Text", {"linear_conv_kernel_dim": 6, "tie_word_embeddings": True}),
    "qwen3.5 moe": ("Qwen3_5MoeText", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3 next": ("Qwen3Next", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "lfm2": ("Lfm2", LFM2),
    "lfm2 moe": ("Lfm2Moe", LFM2 | EXPERTS | {"num_dense_layers": 1, "routed_scaling_factor": 2.5}),
    "granite 4": ("GraniteMoeHybrid", MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granite 4, steps within limits": (
        "GraniteMoeHybrid",
        MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0, "time_step_limit": [0.6, 0.8]},
    ),
    "granite 4, with experts": (
        "GraniteMoeHybrid",
        MAMBA | {"num_local_experts": 8, "num_experts_per_tok": 3, "mamba_n_groups": 2, "mamba_proj_bias": True},
    ),
    "nemotron h": ("NemotronH", NEMOTRON_H | {"use_conv_bias": False}),
    "nemotron h, with experts": ("NemotronH", NEMOTRON_H_MOE | {"use_bias": True}),
    "nemotron h, with experts of narrower rows": ("NemotronH", NEMOTRON_H_MOE | {"moe_latent_size": 32}),
    "falcon h1": ("FalconH1", FALCON_H1),
    "falcon h1, normed behind gates": (
        "FalconH1",
        FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False},
    ),
    "falcon h1, normed before gates": (
        "FalconH1",
        FALCON_H1
        | {"mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_proj_bias": True, "projectors_bias": True}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen3 next, some dense": (
        "Qwen3Next",
        EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1], "num_hidden_layers": 5},
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_state_models(tmp_path_factory.mktemp("models"), VARIANTS)


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 512, (length,), generator=generator).tolist() for length in lengths]


def _answers(engine: Engine, asked: list[list[int]], chunk: int) -> list[list[int]]:
    driver, sampling = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=NUM_TOKENS)
    return driver.generate([driver.add(prompt, sampling) for prompt in asked], chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    asked = prompts([1, 2, 15, 16, 17, 70, 200])
    answers = []
    for block_size, chunk in ((16, 10**9), (8, 7), (None, 64)):
        engine = make_engine(checkpoints / variant, block_size=block_size)
        answers.append(_answers(engine, asked, chunk))
        for prompt, answer in zip(asked, answers[-1], strict=True):
            following = reference_logprobs(checkpoints / variant, (*prompt, *answer[:-1]))[len(prompt) - 1 :]
            chosen = following.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            assert bool((following.amax(1) - chosen <= NEAR).all()), (block_size, chunk)
    assert sum(map(list.__eq__, answers[0], answers[1])) >= 5  # one or two nearly tie somewhere


@pytest.mark.parametrize("native", [False, True], ids=["torch", "C++"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Qwen3_5Text", {"linear_conv_kernel_dim": 1}),
        ("Lfm2", LFM2 | {"conv_L_cache": 1}),
        ("Lfm2Moe", LFM2 | EXPERTS | {"num_dense_layers": 1, "conv_L_cache": 1}),
        ("FalconH1", FALCON_H1 | {"mamba_d_conv": 1}),
    ],
    ids=["delta net", "short", "short, with experts", "mamba"],
)
def test_a_convolution_may_see_the_token_itself_alone(
    tmp_path: Path, kind: str, fields: dict[str, object], native: bool
) -> None:
    model_dir = write_state_models(tmp_path, {"model": (kind, fields)}, head_dim=64) / "model"
    engine = Engine(engine_config(model_dir, block_size=16), num_blocks=64, native=native)
    [asked] = prompts([40])
    [answer] = _answers(engine, [asked], 7)
    following = reference_logprobs(model_dir, (*asked, *answer[:-1]))[len(asked) - 1 :]
    chosen = following.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert bool((following.amax(1) - chosen <= NEAR).all())


def test_a_checkpoint_has_the_tensors_that_its_config_tells_of(checkpoints: Path) -> None:
    for variant in VARIANTS:
        check_checkpoint(checkpoints / variant, ModelConfig.from_dir(checkpoints / variant))


def test_a_part_of_a_larger_model_is_the_same(checkpoints: Path, tmp_path: Path) -> None:
    text = SMALL | STATES | {"model_type": "qwen3_5_text"}
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "patch_size": 14}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=seeing | {"out_hidden_size": 64})
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    alone = transformers.Qwen3_5ForCausalLM.from_pretrained(checkpoints / "qwen3.5")
    model.model.language_model.load_state_dict(alone.model.state_dict())
    model.lm_head.load_state_dict(alone.lm_head.state_dict())
    model.save_pretrained(tmp_path)
    check_checkpoint(tmp_path, ModelConfig.from_dir(tmp_path))
    asked = prompts([30])
    assert _answers(make_engine(tmp_path), asked, 7) == _answers(make_engine(checkpoints / "qwen3.5"), asked, 7)


def test_states_lie_behind_keys_and_values_in_pages_that_are_shipped_last(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "qwen3.5", block_size=16)
    states = engine.model_config.states
    assert states is not None and states.layers == (True, True, True, False)
    # The last three tokens' queries, keys and values, four heads' matrices, and the number of tokens.
    assert states.layer_size == 3 * (2 * 2 * 16 + 4 * 16) + 4 * 16 * 16 + 1
    assert states.num_shares == 2 and 2 * states.share_size == states.layer_size + 1  # each has that number
    page_bytes = 2 * 2 * 16 * 16 * 4
    assert engine.spec.num_layers == 1 + -(-3 * 2 * states.share_size * 4 // page_bytes)
    assert engine.spec.block_bytes() == engine.kv_pages[:, 0].numel() * 4
    driver, told = Driver(engine), list[int]()
    driver.step([(driver.add(range(4, 44)), 40)], told.append)
    assert told == list(range(engine.spec.num_layers))


def test_a_block_is_as_long_as_what_it_keeps_demands(checkpoints: Path) -> None:
    spec = make_engine(checkpoints / "qwen3.5").spec
    states = ModelConfig.from_dir(checkpoints / "qwen3.5").states
    assert states is not None
    assert spec.block_size == 128  # 256 bytes of keys and values a token, 17 KB of states
    assert spec.page_bytes() >= states.num_bytes > spec.page_bytes() // 2


@pytest.mark.parametrize(("num_blocks", "num_staged"), [(8, 8), (64, 16)])
def test_what_is_read_from_a_disk_comes_into_a_quarter_of_the_cache(
    checkpoints: Path, tmp_path: Path, num_blocks: int, num_staged: int
) -> None:
    engine = make_engine(
        checkpoints / "qwen3.5", num_blocks=num_blocks, disk_cache_dir=tmp_path, host_cache_memory_bytes=None
    )
    assert engine.spec.block_size == 128 and engine.num_host_blocks == num_staged  # or 1,024 tokens


def test_what_a_block_held_before_is_no_state_of_its_new_owner(checkpoints: Path) -> None:
    [asked] = prompts([40])
    clean = _answers(make_engine(checkpoints / "qwen3.5"), [asked], 7)
    engine = make_engine(checkpoints / "qwen3.5")
    engine.kv_pages.fill_(torch.nan)
    assert _answers(engine, [asked], 7) == clean


def test_a_state_goes_with_its_block(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "qwen3.5", swap_space=2**22, block_size=16)
    assert swapped_in_the_middle(engine) == undisturbed(engine)
    driver = Driver(engine)
    [prompt] = prompts([20])
    seq = driver.add(prompt)
    driver.step([(seq, 20)])
    alone = driver.add([*prompt, seq.token_ids[-1]])
    driver.step([(alone, 21)])
    assert driver.step_fork(seq) == alone.token_ids[-1]


def test_a_token_that_is_computed_again_is_told_from_the_next_one(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "qwen3.5", block_size=16)
    driver = Driver(engine)
    seq = driver.add(range(4, 24))
    driver.step([(seq, 19)])
    driver.step([(seq, 1)])
    seq.num_computed_tokens -= 1
    with pytest.raises(ForeignStateError, match=r"states of \[20.0\] tokens in place of \[19\]"):
        engine.step(Batch([BatchRow(seq, 1)], may_postpone=True))


@pytest.mark.parametrize("has_states", [True, False])
def test_no_row_of_a_model_with_states_is_postponed(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_states: bool
) -> None:
    if not has_states:
        write_model(tmp_path, transformers.Qwen3Config(**SMALL))
    engine = make_engine(checkpoints / "qwen3.5" if has_states else tmp_path)
    driver, begun = Driver(engine), list[bool]()
    monkeypatch.setattr(engine._masks, "begin", lambda batch: begun.append(batch.may_postpone))
    seq = driver.add(range(4, 24))
    driver.grow(seq, 20)
    batch = Batch([BatchRow(seq, 20)], may_postpone=True)
    engine.step(batch)
    assert begun == [not has_states] and batch.may_postpone


def test_long_blocks_are_for_states(tmp_path: Path) -> None:
    write_model(tmp_path, transformers.Qwen3Config(**SMALL))
    with pytest.raises(ConfigError, match="block_size: 256 tokens are for models that keep states"):
        make_engine(tmp_path, block_size=256)
    assert make_engine(tmp_path).spec.block_size == 16


def test_bfloat16_is_near_float32(checkpoints: Path) -> None:
    [asked] = prompts([60])
    sampling = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    found = {}
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(checkpoints / "qwen3.5", dtype=dtype)
        driver = Driver(engine)
        driver.grow(seq := driver.add(asked, sampling), len(asked))
        [row] = engine.step(Batch([BatchRow(seq, len(asked))])).rows
        found[dtype] = torch.tensor([token.logprob for token in row.prompt_logprobs])
    assert (found["float32"] - found["bfloat16"]).abs().median() < 0.2  # of some 8 on average


def test_adapters_go_beside_layers_with_states(checkpoints: Path, tmp_path: Path) -> None:
    model_dir = checkpoints / "qwen3.5"
    targets = ("in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "o_proj", "up_proj")
    adapter = write_adapter(tmp_path / "adapter", model_dir, rank=8, targets=targets, seed=3, alpha=32)
    engine = make_engine(model_dir, enable_lora=True, max_loras=2)
    put(engine, 1, adapter)
    driver, merged = Driver(engine), Driver(make_engine(merge(model_dir, adapter, tmp_path / "merged")))
    asked = prompts([40, 17])
    wanted = merged.generate([merged.add(prompt) for prompt in asked])
    assert driver.generate([sequence(driver, prompt, 1) for prompt in asked], chunk=9) == wanted
    assert [answer[: len(wanted[0])] for answer in _answers(engine, asked, 9)] != wanted
