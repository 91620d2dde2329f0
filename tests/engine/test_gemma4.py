"""Gemma 4's layers, whose heads are of two sizes, compute what transformers' own class computes, in whatever steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.uneven import layers_of_pages
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.parts.uneven_heads import Heads, UnevenHeads

from ..engine_driver import GREEDY, Driver, make_engine, prompt_logprobs
from ..transformers_checkpoints import GEMMA_4, GEMMA_4_BORROWING, GEMMA_4_MOE, SMALL, draw, write_model
from .test_adapters import assert_adapted_as_merged
from .transformers_reference import reference_logprobs

VARIANTS: dict[str, dict[str, object]] = {
    "keys are values": {},
    "borrowed keys": GEMMA_4_BORROWING,
    "experts": GEMMA_4_MOE,
    "values of their own": {"attention_k_eq_v": False, "num_key_value_heads": 4, "final_logit_softcapping": None},
    "one head": {"attention_k_eq_v": False, "num_key_value_heads": 1, "attention_bias": True},
}
NEAR = 1e-3  # logits that a rounding may bring into the other order
PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(110)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        write_model(root / name, transformers.Gemma4TextConfig(**SMALL | GEMMA_4 | fields), draws_norms=True)
    return root


def _answers(engine: Engine, asked: list[list[int]], chunk: int) -> list[list[int]]:
    driver, sampling = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=20)
    return driver.generate([driver.add(prompt, sampling) for prompt in asked], chunk=chunk)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    """A window has 40 tokens: it begins within a page, a step, an answer, and at their borders."""
    check_checkpoint(checkpoints / variant, ModelConfig.from_dir(checkpoints / variant))
    asked = [PROMPT[:length] for length in (1, 31, 39, 40, 41, 95, 110)]
    for block_size, chunk in ((16, 10**9), (8, 7), (128, 64)):
        engine = make_engine(checkpoints / variant, block_size=block_size)
        for prompt, answer in zip(asked, _answers(engine, asked, chunk), strict=True):
            following = reference_logprobs(checkpoints / variant, (*prompt, *answer[:-1]))[len(prompt) - 1 :]
            chosen = following.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            assert bool((following.amax(1) - chosen <= NEAR).all()), (block_size, chunk)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_steps_are_those_of_transformers_in_any_chunks(checkpoints: Path, variant: str) -> None:
    engine = make_engine(checkpoints / variant, deterministic=True)
    wanted = reference_logprobs(checkpoints / variant, tuple(PROMPT))[:-1]
    wanted = wanted.gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1)
    assert (prompt_logprobs(engine, PROMPT) - wanted).abs().max() < NEAR
    assert _answers(engine, [PROMPT[:90], PROMPT], 64) == _answers(engine, [PROMPT[:90], PROMPT], 7)


def test_experts_are_counted(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "experts")
    _answers(engine, [PROMPT], 64)
    assert [each.layer for each in engine.expert_loads()] == list(range(6))
    assert all(sum(each.taken) >= 3 * len(PROMPT) for each in engine.expert_loads())


def test_pages_are_told_of_when_all_of_their_layers_are_computed(checkpoints: Path) -> None:
    engine, told = make_engine(checkpoints / "keys are values"), list[int]()
    driver = Driver(engine)
    driver.step([(driver.add(PROMPT), 64)], told.append)
    assert told == list(range(5)) and engine.kv_pages.shape[0] == 5  # two of the six layers lie in one
    assert ModelConfig.from_dir(checkpoints / "keys are values").pages_behind(2) == ()


@pytest.mark.parametrize(
    ("narrow", "wide", "are_wide"),
    [
        (Heads(16, 256), Heads(4, 512), (False, True) * 4),  # 31B
        (Heads(8, 256), Heads(2, 512), (False, True) * 2),  # 26B-A4B
        (Heads(2, 256), Heads(2, 512), (False, False, True)),  # E4B
        (Heads(1, 256), Heads(1, 512), (False, False, True)),  # E2B
    ],
)
def test_layers_share_pages_without_a_hole(narrow: Heads, wide: Heads, are_wide: tuple[bool, ...]) -> None:
    heads = UnevenHeads(narrow=narrow, wide=wide, are_wide=are_wide)
    places, width = heads.page
    pages = torch.zeros(heads.num_pages, 3, 2, places, 4, width)
    layers = layers_of_pages(pages, heads)
    for layer, view in enumerate(layers):
        assert view.shape == (3, 2, heads.of(layer).num_kv, 4, heads.of(layer).dim)
        assert bool((view == 0).all())  # no other layer's
        view.fill_(layer + 1)
    assert bool((pages > 0).all())
    halves = [pages[:, :, :, :1], pages[:, :, :, 1:]] if places > 1 else []
    for half, part in enumerate(halves if places == 2 else []):  # a rank's pages are its heads
        for layer, view in enumerate(layers_of_pages(part.contiguous(), heads)):
            own = heads.of(layer).num_kv // 2
            assert torch.equal(view, layers[layer][:, :, half * own : (half + 1) * own])


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("keys are values", ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")),
        ("experts", ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj")),
        ("borrowed keys", ("q_proj", "per_layer_input_gate", "per_layer_projection", "down_proj")),
    ],
)
def test_adapters_go_beside_layers(checkpoints: Path, tmp_path: Path, variant: str, targets: tuple[str, ...]) -> None:
    assert_adapted_as_merged(checkpoints / variant, tmp_path, targets, PROMPT)


def test_what_would_make_borrowed_keys_is_left_out(checkpoints: Path, tmp_path: Path) -> None:
    """Published checkpoints have it, as training does."""
    path = shutil.copytree(checkpoints / "borrowed keys", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    own = {name.replace("layers.2.", "layers.5."): tensor for name, tensor in tensors.items() if "layers.2." in name}
    of_keys = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    added = {name: tensor.clone() for name, tensor in own.items() if name.endswith(of_keys)}
    assert len(added) == 3 and not added.keys() & tensors.keys()
    save_file(tensors | added, path / "model.safetensors", metadata={"format": "pt"})
    check_checkpoint(path, ModelConfig.from_dir(path))
    found = [prompt_logprobs(make_engine(each), PROMPT) for each in (path, checkpoints / "borrowed keys")]
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", ["keys are values", "borrowed keys", "experts"])
def test_bfloat16_is_as_near_float32_as_that_of_transformers(checkpoints: Path, variant: str) -> None:
    path, following = checkpoints / variant, torch.tensor(PROMPT[1:]).unsqueeze(1)
    wanted = reference_logprobs(path, tuple(PROMPT))[:-1].gather(1, following).squeeze(1)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = theirs(torch.tensor([PROMPT])).logits[0, :-1].float()
    rounded = logits.log_softmax(-1).gather(1, following).squeeze(1)
    found = prompt_logprobs(make_engine(path, dtype="bfloat16"), PROMPT)
    assert (found - wanted).abs().mean() < 1.2 * (rounded - wanted).abs().mean()


def test_a_language_model_beside_what_sees_and_hears_is_read_alone(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    seeing = small | {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 16}
    hearing = small | {"subsampling_conv_channels": [4, 4], "output_proj_dims": 16}
    text = SMALL | GEMMA_4_BORROWING | {"use_bidirectional_attention": "vision", "tie_word_embeddings": True}
    config = transformers.Gemma4Config(text_config=text, vision_config=seeing, audio_config=hearing)
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    draw(model)
    model.save_pretrained(tmp_path)
    check_checkpoint(tmp_path, ModelConfig.from_dir(tmp_path))
    with torch.inference_mode():
        seen = torch.zeros(1, len(PROMPT), dtype=torch.long)
        logits = model(torch.tensor([PROMPT]), mm_token_type_ids=seen).logits[0]
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1)
    assert (prompt_logprobs(make_engine(tmp_path), PROMPT) - wanted).abs().max() < NEAR


def test_pages_in_whole_numbers_are_refused(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: int8 is for layers whose heads are all of one size"):
        make_engine(checkpoints / "keys are values", kv_cache_dtype="int8")
