"""Quantized checkpoints, format by format, judged by transformers on the plain weights that they stand for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.common.request import SamplingParams
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.gguf_blocks import unpack_blocks
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.checkpoint import check_act_order, check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.storage import GGUF_KINDS, Form

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, make_engine, prompts
from ...quantized import FORMATS, SHAPE, put_config, random_blocks, write_pair
from ..transformers_reference import reference_logprobs

FLOAT32, BFLOAT16 = 1e-5, 0.02  # how far a log-probability may be from the reference's, as a part of their range
JUDGED = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
every_format = pytest.mark.parametrize("name", FORMATS)


class _FakeRank(Communicator):
    """A rank whose collectives are never used: only its shards matter."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def _load(path: Path, *, rank: int = 0, size: int = 1) -> Decoder:
    decoder = Decoder(
        ModelConfig.from_dir(path), _FakeRank(rank, size), dtype=torch.float32, device=torch.device("cpu")
    )
    load_weights(decoder, path, load_format="auto", seed=0)
    return decoder


def assert_as_transformers(
    quantized: Path, plain: Path, *, dtype: str = "float32", within: float = FLOAT32, **fields: object
) -> None:
    [prompt] = prompts([40], 250)
    driver = Driver(make_engine(quantized, 128, dtype=dtype, **fields))
    driver.step([(driver.add(prompt, JUDGED), 40)])
    expected = reference_logprobs(plain, tuple(prompt))
    tolerance = within * float(expected.max() - expected.min())
    [row] = driver.outputs[-1].rows
    assert len(row.prompt_logprobs) == 39
    for position, token in enumerate(row.prompt_logprobs):
        assert token.logprob == pytest.approx(float(expected[position, token.token_id]), abs=tolerance)


def _matrices(decoder: Decoder) -> list[Tensor]:
    weights = [linear.weight for linear in decoder.linears()]
    return [
        weight.dequantized() if isinstance(weight, GroupedWeight) else weight.plain
        for weight in weights
        if isinstance(weight, GroupedWeight | DenseWeight)
    ]


@every_format
def test_log_probabilities_are_those_of_the_plain_weights(tmp_path: Path, name: str) -> None:
    quantized, plain = write_pair(tmp_path, name)
    config = ModelConfig.from_dir(quantized)
    check_checkpoint(quantized, config)
    assert config.quantization is not None and config.quantization.method in name.replace(
        "compressed", "compressed-tensors"
    )
    assert_as_transformers(quantized, plain)


@pytest.mark.parametrize(
    "name",
    [
        *("compressed int8 channel", "compressed int4 packed", "compressed int8 asymmetric", "compressed fp8 block"),
        *("gptq 4 act-order", "gptq 4 whole rows", "gptq 8 asymmetric", "awq"),
        *("modelopt nvfp4", "modelopt mixed", "compressed mxfp4"),
    ],
)
def test_in_bfloat16_rounded_inputs_stay_near(tmp_path: Path, name: str) -> None:
    assert_as_transformers(*write_pair(tmp_path, name), dtype="bfloat16", within=BFLOAT16)


@every_format
def test_ranks_hold_the_parts_of_the_whole(tmp_path: Path, name: str) -> None:
    quantized, plain = write_pair(tmp_path, name)
    if "act-order" in name:
        with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj.*act-order"):
            _load(quantized, size=2)
        return
    for rank in range(2):
        ours, theirs = (_matrices(_load(path, rank=rank, size=2)) for path in (quantized, plain))
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_blocks_of_gguf_are_read_as_its_own_package_reads_them(kind: str) -> None:
    rows, wanted = random_blocks(kind, np.random.default_rng(0), 6, 512)
    weight = unpack_blocks(kind, torch.from_numpy(rows), torch.float32)
    form = GGUF_KINDS[kind].form
    assert (weight.bits, weight.group_size, weight.minima is not None) == (form.bits, form.group_size, form.has_minima)
    assert np.array_equal(weight.dequantized().numpy(), wanted)


@pytest.mark.parametrize(("asked", "bits", "group_size"), [("int8", 8, 256), ("int4", 4, 128)])
def test_a_plain_checkpoint_is_rounded_while_it_is_loaded(
    tmp_path: Path, asked: str, bits: int, group_size: int
) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE, tie_embeddings=True)
    engine = make_engine(path, dtype="float32", quantization=asked)
    plain = make_engine(path, dtype="float32")
    assert engine.spec.model != plain.spec.model
    tensors = load_file(path / "model.safetensors")
    rounded = dict(tensors)
    for name, matrix in tensors.items():
        if name.endswith("_proj.weight"):
            form = Form(bits, 128 if bits == 4 else matrix.shape[1], has_minima=False)
            rounded[name] = GroupedWeight.quantized(matrix, form).dequantized()
    head = tensors["model.embed_tokens.weight"]
    rounded["lm_head.weight"] = GroupedWeight.quantized(head, Form(8, 256, has_minima=False)).dequantized()
    other = write_checkpoint(tmp_path / "rounded", tokenizer=False, shape=SHAPE)
    save_file(rounded, other / "model.safetensors", metadata={"format": "pt"})
    assert_as_transformers(path, other, quantization=asked)


def test_dummy_weights_are_rounded_to_the_checkpoints_form(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "gptq 4 asymmetric act-order")
    (quantized / "model.safetensors").unlink()
    driver = Driver(make_engine(quantized, load_format="dummy", dtype="float32"))
    assert driver.generate([driver.add([1, 2, 3])])


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_bias_that_config_json_does_not_tell_of_is_refused(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "gptq 4")
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    tensors[name] = torch.zeros(SHAPE.intermediate_size, dtype=torch.float16)
    save_file(tensors, quantized / "model.safetensors")
    check_checkpoint(quantized, ModelConfig.from_dir(quantized))
    _load(quantized)
    tensors[name][3] = 1
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj.*bias"):
        _load(quantized)


def test_zeros_that_are_not_the_middle_are_not_symmetrical(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "gptq 8 asymmetric")
    put_config(quantized, quantization_config={**FORMATS["gptq 8 asymmetric"].config, "sym": True})
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj.* called symmetrical and has zeros that are not 128"):
        _load(quantized)


def test_scales_of_8_bit_floats_may_be_exponents_in_bytes(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "fp8 block")
    tensors = load_file(quantized / "model.safetensors")
    exponents = {
        name: 120 + torch.arange(each.numel()).view(each.shape) % 8
        for name, each in tensors.items()
        if name.endswith("_scale_inv")
    }
    found = []
    for kind in (torch.float32, torch.uint8, torch.float8_e8m0fnu):
        scales = {
            name: each.to(kind) if kind == torch.uint8 else torch.exp2(each - 127.0).to(kind)
            for name, each in exponents.items()
        }
        save_file({**tensors, **scales}, quantized / "model.safetensors")
        check_checkpoint(quantized, ModelConfig.from_dir(quantized))
        found.append(_matrices(_load(quantized)))
    for plain, *others in zip(*found, strict=True):
        assert all(torch.equal(plain, other) for other in others)


@pytest.mark.parametrize(
    ("name", "suffix", "kind", "told"),
    [
        ("fp8 block", "weight_scale_inv", torch.int32, "I32, config.json implies floats or U8"),
        ("fp8 tensor", "weight", torch.uint8, "U8, config.json implies F8_E4M3"),
        ("gptq 4", "scales", torch.int32, "I32, config.json implies floats"),
        ("gptq 4", "qweight", torch.int64, "I64, config.json implies I32"),
        ("gptq 4 act-order", "g_idx", torch.float32, "F32, config.json implies I32 or I64"),
        ("awq", "qzeros", torch.float16, "F16, config.json implies I32"),
        ("compressed int8 channel", "weight", torch.float16, "F16, config.json implies I8"),
        ("modelopt nvfp4", "weight_scale_2", torch.uint8, "U8, config.json implies floats"),
        ("compressed mxfp4", "weight_scale", torch.float32, "F32, config.json implies U8"),
    ],
)
def test_tensors_of_another_type_are_refused_by_name(
    tmp_path: Path, name: str, suffix: str, kind: torch.dtype, told: str
) -> None:
    """Before a byte of them is read, by a file's header."""
    quantized, _ = write_pair(tmp_path, name)
    tensors = load_file(quantized / "model.safetensors")
    end = f"layers.1.self_attn.q_proj.{suffix}"
    tensors = {key: each.to(kind) if key.endswith(end) else each for key, each in tensors.items()}
    save_file(tensors, quantized / "model.safetensors")
    for check in (lambda: check_checkpoint(quantized, ModelConfig.from_dir(quantized)), lambda: _load(quantized)):
        with pytest.raises(ConfigError, match=rf"{re.escape(end)} holds {re.escape(told)}$"):
            check()


@pytest.mark.parametrize("name", ["compressed int8 channel", "compressed int8 asymmetric", "compressed fp8 channel"])
def test_scales_of_outputs_may_be_a_vector(tmp_path: Path, name: str) -> None:
    """Zeros too."""
    quantized, plain = write_pair(tmp_path, name)
    tensors = load_file(quantized / "model.safetensors")
    vectors = {key: each.flatten() for key, each in tensors.items() if key.endswith(("_scale", "_zero_point"))}
    assert all(len(each) > 1 for each in vectors.values())
    save_file({**tensors, **vectors}, quantized / "model.safetensors")
    check_checkpoint(quantized, ModelConfig.from_dir(quantized))
    for found, wanted in zip(_matrices(_load(quantized)), _matrices(_load(plain)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (torch.full((256,), 2**31 - 1), "does not name 8 groups of one size"),
        (torch.arange(256) // 16, "does not name 8 groups of one size"),
        (torch.cat([torch.tensor([-1]), (torch.arange(256) // 32)[1:]]), "does not name 8 groups of one size"),
        (torch.arange(512) // 64, "does not name 8 groups of one size"),
        ((torch.arange(256) // 32).view(1, 256), "does not name 8 groups of one size"),
        ((torch.arange(256) // 32).float(), "holds torch.float32, not whole numbers"),
    ],
)
def test_groups_of_inputs_that_cannot_be_meant_are_refused(tmp_path: Path, groups: Tensor, told: str) -> None:
    quantized, _ = write_pair(tmp_path, "gptq 4")
    tensors = load_file(quantized / "model.safetensors")
    kind = torch.float32 if groups.is_floating_point() else torch.int32
    tensors["model.layers.0.self_attn.q_proj.g_idx"] = groups.to(kind)
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"q_proj: its g_idx {told}"):
        _load(quantized)


def test_act_order_without_the_groups_of_inputs_is_refused(tmp_path: Path) -> None:
    """It would be loaded as if inputs stood in order."""
    quantized, _ = write_pair(tmp_path, "gptq 4 act-order")
    tensors = load_file(quantized / "model.safetensors")
    save_file({key: each for key, each in tensors.items() if "g_idx" not in key}, quantized / "model.safetensors")
    for check in (lambda: check_checkpoint(quantized, ModelConfig.from_dir(quantized)), lambda: _load(quantized)):
        with pytest.raises(ConfigError, match=r"14 tensors are missing: model\.layers\.0\.mlp\.down_proj\.g_idx"):
            check()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_ranks_do_not_share_inputs_in_act_order(tmp_path: Path, kind: torch.dtype) -> None:
    """Told before anything is loaded; inputs that stand in order can be shared, whatever config.json calls them."""
    quantized, _ = write_pair(tmp_path, "gptq 4 act-order")
    quantization = ModelConfig.from_dir(quantized).quantization
    tensors = load_file(quantized / "model.safetensors")
    tensors |= {key: each.to(kind) for key, each in tensors.items() if key.endswith("g_idx")}
    save_file(tensors, quantized / "model.safetensors")
    down, up = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    with pytest.raises(
        ConfigError,
        match=r"layers\.1\.mlp\.down_proj: weights in act-order .* --tensor-parallel-size 1 or .*--prefill-tensor-",
    ):
        check_act_order(quantized, quantization, [down])
    tensors[f"{down}.g_idx"] = (torch.arange(512) // 32).to(kind)
    save_file(tensors, quantized / "model.safetensors")
    check_act_order(quantized, quantization, [down, "lm_head"])
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: weights in act-order"):
        check_act_order(quantized, quantization, [down, up])


@pytest.mark.parametrize("name", ["gptq 4", "compressed int4 packed", "fp8 block", "awq"])
def test_no_file_is_read_for_an_act_order_that_config_json_does_not_tell_of(tmp_path: Path, name: str) -> None:
    """A mixture of experts has tens of thousands of matrices, each of whose inputs would be looked at."""
    quantized, _ = write_pair(tmp_path, name)
    quantization = ModelConfig.from_dir(quantized).quantization
    check_act_order(tmp_path / "nothing is here", quantization, ["model.layers.0.mlp.down_proj"])


def test_a_tensor_of_a_wrong_shape_is_named(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "awq")
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name][1:].contiguous()
    save_file(tensors, quantized / "model.safetensors")
    for check in (lambda: check_checkpoint(quantized, ModelConfig.from_dir(quantized)), lambda: _load(quantized)):
        with pytest.raises(ConfigError, match=r"up_proj\.scales has shape \[7, 512\], config\.json implies \[8, 512\]"):
            check()


def test_groups_that_do_not_divide_a_ranks_inputs_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE, intermediate_size=768)
    put_config(path, quantization_config={**FORMATS["gptq 4"].config, "group_size": 256})
    told = r"down_proj: a rank's 384 inputs of 768 are no whole groups of 256; .* or .*--prefill-tensor-parallel-size"
    with pytest.raises(ConfigError, match=told):
        Decoder(ModelConfig.from_dir(path), _FakeRank(0, 2), dtype=torch.float32, device=torch.device("cpu"))
