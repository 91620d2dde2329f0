"""Products with quantized weights in C++: to the bit what they are defined as, whatever is computed beside them."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.request import SamplingParams
from kvferry.engine import engine as engine_module
from kvferry.engine.choose import pack_weights
from kvferry.engine.cpu import build as native
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.cpu.model import NativeModel
from kvferry.engine.cpu.packing import Packed, Packer, check_known
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.layers import Linear
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.models.default import cache_dir
from kvferry.models.storage import Form

from ...checkpoints import put_nan, write_checkpoint
from ...engine_driver import Driver, engine_config, prompts
from .integer_reference import Floats, product

GROUP_SIZES = (8, 16, 24, 32, 40, 64, 128)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def library(isa: str) -> ctypes.CDLL:
    """Each instruction set's in turn: what is equal to one reference is equal on all of them."""
    return native.load(cache_dir())


@st.composite
def weights(draw: st.DrawFn) -> GroupedWeight:
    """Matrices of every kind: numbers and factors of all sizes, in groups or in whole rows of any length."""
    bits, num_outputs = draw(st.sampled_from([4, 8])), draw(st.integers(1, 150))
    group_size = draw(st.sampled_from([0, *GROUP_SIZES]))
    num_groups = draw(st.integers(1, 5)) if group_size else 1
    num_inputs = group_size * num_groups or 2 * draw(st.integers(1, 170))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    if bits == 4:
        numbers = torch.randint(0, 256, (num_outputs, num_inputs // 2), generator=generator).to(torch.uint8)
    else:
        numbers = torch.randint(-128, 128, (num_outputs, num_inputs), generator=generator).to(torch.int8)

    is_half = draw(st.booleans())

    def factors() -> Tensor:
        values = torch.randn(num_outputs, num_groups, generator=generator)
        return values.half().float() if is_half else values

    if bits == 4 and draw(st.booleans()):
        exponents = torch.randint(-20, 20, (num_outputs, num_groups), generator=generator)
        powers = torch.ldexp(torch.ones(exponents.shape), exponents)
        floats = torch.randint(0, 127, (num_outputs, num_groups), generator=generator).to(torch.uint8)
        of_bases = floats.view(torch.float8_e4m3fn).float() * torch.rand(num_outputs, 1, generator=generator)
        scales = draw(st.sampled_from([powers, factors(), of_bases]))
        return GroupedWeight(numbers, scales, dtype=torch.bfloat16, is_e2m1=True)
    scales, minima = factors(), factors() if draw(st.booleans()) else None
    order = torch.randperm(num_inputs, generator=generator).to(torch.int32) if draw(st.booleans()) else None
    return GroupedWeight(numbers, scales, minima, order, dtype=torch.bfloat16)


def _rows(count: int, num_inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, num_inputs, generator=generator) * 3).bfloat16()


def _multiply(library: ctypes.CDLL, packed: Packed, x: Tensor, parts: int = 1, *, may_widen: bool = False) -> Floats:
    """Multiply rows by a packed matrix, its tiles in so many parts as by threads."""
    rows, columns = len(x), int(packed.tiles.columns)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).contiguous()
    num_tiles = -(-columns // 64)
    y = torch.full((rows, num_tiles * 64), math.inf)
    function = library.kvferry_multiply
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_long] * 4, ctypes.c_bool, ctypes.c_void_p]
    for part in range(parts):
        first, last = num_tiles * part // parts, num_tiles * (part + 1) // parts
        sizes = (padded.shape[1], rows, first, last, may_widen)
        function(ctypes.byref(packed.tiles), padded.data_ptr(), *sizes, y.data_ptr())
    return y[:, :columns].numpy()


def _packed(library: ctypes.CDLL, weight: GroupedWeight) -> Packed:
    """Pack a copy, so that the weight can be looked at."""
    copy = GroupedWeight(
        weight.numbers, weight.scales, weight.minima, weight.order, dtype=weight.dtype, is_e2m1=weight.is_e2m1
    )
    return Packer(library, torch.bfloat16)(copy)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(weight=weights(), count=st.integers(1, 25), seed=SEEDS, parts=st.integers(1, 3))
def test_products_are_those_of_the_definition(
    library: ctypes.CDLL, weight: GroupedWeight, count: int, seed: int, parts: int
) -> None:
    x = _rows(count, weight.num_inputs, seed)
    wanted = product(x, weight)
    packed = _packed(library, weight)
    assert np.array_equal(_multiply(library, packed, x, parts), wanted)
    assert np.array_equal(_multiply(library, packed, x[:1]), wanted[:1]), "other rows are felt"


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(weight=weights(), count=st.integers(1, 80), seed=SEEDS, parts=st.integers(1, 3))
def test_widened_products_are_those_of_the_rounded_weights(
    library: ctypes.CDLL, weight: GroupedWeight, count: int, seed: int, parts: int
) -> None:
    """Many rows on a matrix unit; else, and where rows are few, those of the definition."""
    x = _rows(count, weight.num_inputs, seed)
    y = _multiply(library, _packed(library, weight), x, parts, may_widen=True)
    if np.array_equal(y, product(x, weight)):
        return
    rounded = weight.dequantized().bfloat16().double()
    wanted, sizes = x.double() @ rounded.T, x.double().abs() @ rounded.abs().T
    assert count > 32 and weight.order is None
    assert ((torch.from_numpy(y) - wanted).abs() <= 5e-3 * sizes + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_numbers_do_not_saturate(library: ctypes.CDLL, bits: int, symmetric: bool) -> None:
    """Every product of a long row as large as it can be, of either sign."""
    num_inputs = 8192
    shape = (2, num_inputs * bits // 8)
    numbers = torch.empty(shape, dtype=torch.uint8 if bits == 4 else torch.int8)
    numbers[0], numbers[1] = (0, 255) if bits == 4 else (-128, 127)
    minima = None if symmetric else torch.tensor([[0.5], [-2.0]])
    weight = GroupedWeight(numbers, torch.tensor([[1.0], [3.0]]), minima, dtype=torch.bfloat16)
    x = torch.tensor([1.0, -1.0]).repeat_interleave(num_inputs).view(2, num_inputs).bfloat16()
    assert np.array_equal(_multiply(library, _packed(library, weight), x), product(x, weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_rows_keep_to_themselves(library: ctypes.CDLL, bits: int) -> None:
    matrix = torch.randn(70, 128).bfloat16()
    weight = GroupedWeight.quantized(matrix, Form(bits, 32, has_minima=True))
    packed = _packed(library, weight)
    x = _rows(9, 128)
    sound = _multiply(library, packed, x)
    x[1] = 0
    x[2, 5] = 1e35
    x[3, 7] = math.nan
    x[4, 0] = math.inf
    x[5, 9], x[5, 10] = -math.inf, math.nan
    x[6] = 1e-38
    x[7] = -(2.0**-100)
    y = _multiply(library, packed, x)
    assert np.array_equal(y[[0, 8]], sound[[0, 8]])
    assert not y[[1, 6]].any(), "zeros, and what is as good as zero"
    assert np.isnan(y[3:6]).all()
    assert np.isfinite(y[2]).all() and np.array_equal(y[[2, 7]], product(x, weight)[[2, 7]])


def test_groups_without_weight_add_nothing(library: ctypes.CDLL) -> None:
    weight = GroupedWeight.quantized(torch.zeros(64, 64), Form(4, 16, has_minima=False), dtype=torch.bfloat16)
    assert not weight.scales.any()
    assert not _multiply(library, _packed(library, weight), _rows(3, 64)).any()


def test_factors_are_halves_where_these_are_exact(library: ctypes.CDLL) -> None:
    weight = GroupedWeight.quantized(torch.randn(64, 64), Form(8, 16, has_minima=False), dtype=torch.bfloat16)
    sizes = []
    for scales in (weight.scales, weight.scales.half().float()):
        packed = Packer(library, torch.bfloat16)(GroupedWeight(weight.numbers, scales, dtype=torch.bfloat16))
        sizes.append(packed.tiles.integers.contents.factor_size)
    assert sizes == [4, 2]


def test_factors_of_floats_are_bytes_where_these_are_exact(library: ctypes.CDLL) -> None:
    """Powers of 2 as MXFP4 has them, or what NVFP4 has: floats of 8 bits over a number for all of an output."""
    numbers = torch.randint(0, 256, (130, 128)).to(torch.uint8)
    floats = torch.randint(0, 127, (130, 16)).to(torch.uint8).view(torch.float8_e4m3fn).float()
    some = torch.rand(130, 1) * 0.01
    sizes = []
    for scales in (torch.full((130, 16), 0.125), floats * some, floats * 0.0007, floats + some):
        weight = GroupedWeight(numbers, scales, dtype=torch.bfloat16, is_e2m1=True)
        found = Packer(library, torch.bfloat16)(weight).tiles.integers.contents
        sizes.append((found.factor_size, found.span))
    assert sizes == [(1, 0), (1, 16), (1, 16), (4, 0)]


def test_groups_that_there_are_no_products_for_are_left_to_torch() -> None:
    weight = GroupedWeight.quantized(torch.randn(8, 24).bfloat16(), Form(8, 12, has_minima=False))
    with pytest.raises(NativeUnavailable, match="12 inputs to a group"):
        check_known(Linear("some", weight), torch.bfloat16)


# --- whole models -----------------------------------------------------------------------------------------------

SAMPLING = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
SCHEMES = {"8 bits, rows": (8, 0), "8 bits, groups of 32": (8, 32), "4 bits, groups of 16": (4, 16)}
LOGIT_TOLERANCE = 0.02  # of the logits' range


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"),
        "qwen3",
        tokenizer=False,
        dtype="bfloat16",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        vocab_size=515,
        tie_embeddings=True,
    )


def _quantize(decoder: Decoder, bits: int, group_size: int) -> None:
    """Every linear, the tied head too; of each layer's two down projections one stays as it is."""
    for linear in decoder.linears():
        plain = linear.weight.plain  # type: ignore[attr-defined]
        if "0.mlp.down" not in linear.name:
            form = Form(bits, group_size or plain.shape[1], has_minima=bits == 4)
            linear.weight = GroupedWeight.quantized(plain, form, dtype=decoder.dtype)


def _engine(model_dir: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, **fields: object) -> Engine:
    def pack(decoder: Decoder, device: torch.device, **options: Any) -> NativeModel | None:
        with torch.inference_mode():
            _quantize(decoder, *SCHEMES[scheme])
        return pack_weights(decoder, device, **options)

    monkeypatch.setattr(engine_module, "pack_weights", pack)
    return Engine(engine_config(model_dir, **({"dtype": "bfloat16"} | fields)), num_blocks=128)


def _logits(engine: Engine, steps: list[list[int]], of: list[list[int]] | None = None) -> list[Tensor]:
    """Return each step's logits: so many tokens of some prompts, whose next tokens are given."""
    found: list[Tensor] = []
    decoder = engine.runner.decoder  # type: ignore[attr-defined]
    make = decoder.logits

    def record(hidden: Tensor) -> Tensor:
        logits: Tensor = make(hidden)
        found.append(logits.clone())
        return logits

    decoder.logits = record
    driver = Driver(engine)
    seqs = [driver.add(prompt, SAMPLING) for prompt in of or prompts([100, 30, 9], 500)]
    for counts in steps:
        driver.step([(seq, count) for seq, count in zip(seqs, counts, strict=True) if count])
        for seq in seqs:
            if seq.num_tokens > seq.num_prompt_tokens:
                seq.token_ids[-1] = 7 * seq.num_tokens % 500
    return found


STEPS = [[60, 30, 9], [40, 1, 1], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_near_that_of_its_plain_numbers(
    library: ctypes.CDLL, model_dir: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    ours = _engine(model_dir, monkeypatch, scheme)
    assert isinstance(ours.runner, NativeRunner)
    theirs = _engine(model_dir, monkeypatch, scheme, dtype="float32")
    for one, other in zip(_logits(ours, STEPS), _logits(theirs, STEPS), strict=True):
        other = other[: len(one)]
        assert (one - other).abs().max() <= LOGIT_TOLERANCE * (other.max() - other.min())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_and_other_rows_change_no_bit(
    library: ctypes.CDLL, model_dir: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """In exact mode, where attention keeps to one order too: prompts whole or cut, alone or not, on 1 or 3 threads."""
    whole = _logits(_engine(model_dir, monkeypatch, scheme, deterministic=True), [[100, 0, 0], [1, 0, 0], [1, 0, 0]])
    cut = _logits(
        _engine(model_dir, monkeypatch, scheme, deterministic=True, num_threads=3),
        [[37, 30, 0], [62, 0, 9], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    )
    torch.set_num_threads(1)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(whole, cut[2:], strict=True))


def test_a_row_that_is_not_finite_is_alone_with_it(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = 300
    put_nan(write_checkpoint(tmp_path, tokenizer=False, dtype="bfloat16"), "model.embed_tokens.weight", broken)
    scheme, sound = "8 bits, groups of 32", prompts([40], 299)[0]
    alone = _logits(_engine(tmp_path, monkeypatch, scheme), [[40]], [sound])
    beside = _logits(_engine(tmp_path, monkeypatch, scheme), [[40, 5]], [sound, [7, broken, 8, 9, 10]])
    assert torch.equal(alone[0][0], beside[0][0]) and alone[0].isfinite().all()
    assert beside[0][1].isnan().all()
