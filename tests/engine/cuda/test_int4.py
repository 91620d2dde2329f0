"""Products of nibbles: the numbers that they stand for, what is taken, and checkpoints' answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from kvferry.common.request import SamplingParams
from kvferry.engine.cuda import int4
from kvferry.engine.cuda.int4 import Int4Weight, takes
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.models.quantization import CARD_ROWS
from kvferry.models.storage import Form

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, engine_config, prompts
from ...quantized import SHAPE, write_pair

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs a newer card"
    ),
]
engine_gpu = [
    *gpu,
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
CLOSE = 2e-2  # of the range


def _weight(bits: int, group_size: int, num_inputs: int = 256, *, symmetric: bool = True) -> GroupedWeight:
    matrix = torch.randn(48, num_inputs, generator=torch.Generator().manual_seed(bits + group_size))
    return GroupedWeight.quantized(matrix, Form(bits, group_size, not symmetric), dtype=torch.bfloat16)


def _on(device: str, weight: GroupedWeight) -> GroupedWeight:
    tensors = (weight.numbers, weight.scales, weight.minima, weight.order)
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return GroupedWeight(*moved, dtype=weight.dtype)  # type: ignore[arg-type]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / (theirs.max() - theirs.min()))


def _rms(ours: Tensor, theirs: Tensor) -> float:
    """The distance of whole models, whose layers round to bfloat16: their worst number is another on each processor."""
    return float((ours - theirs).square().mean().sqrt() / (theirs.max() - theirs.min()))


@cuda
@pytest.mark.parametrize("num_rows", [0, 1, 5, CARD_ROWS, CARD_ROWS + 1, 150])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "num_inputs"),
    [(4, 32, 96), (4, 64, 64), (4, 128, 256), (4, 96, 192), (4, 512, 512), (4, 160, 160), (8, 32, 96), (8, 288, 288)],
)
def test_a_product_is_that_of_the_numbers(
    bits: int, group_size: int, num_inputs: int, symmetric: bool, num_rows: int, device: str
) -> None:
    grouped = _weight(bits, group_size, num_inputs, symmetric=symmetric)
    plain = grouped.dequantized()
    weight = Int4Weight(_on(device, grouped))
    x, bias = (torch.randn(*size).bfloat16() for size in ((num_rows, num_inputs), (48,)))
    for each in (None, bias):
        found = weight.product(x.to(device), None if each is None else each.to(device)).cpu()
        expected = x.float() @ plain.T + (0 if each is None else each.float())
        assert found.shape == expected.shape and found.dtype == torch.bfloat16
        if num_rows:
            assert _distance(found, expected) < CLOSE / 2


@cuda
def test_both_ways_widen_to_the_same_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows with a single 1 the product is a column: each number of the matrix is seen."""
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        grouped = _weight(bits, 32, 160, symmetric=symmetric)
        weight = Int4Weight(_on(device, grouped))
        eye = torch.eye(160).bfloat16().to(device)
        few = torch.cat([weight.product(part, None) for part in torch.split(eye, 40)])
        monkeypatch.setattr(int4, "_WIDENED", 160 * 8 * 2)  # some outputs after others
        many = weight.product(eye, None)
        rtol = 0 if bits == 4 else 2**-7
        torch.testing.assert_close(few.cpu(), many.cpu(), rtol=rtol, atol=0)
        torch.testing.assert_close(few.cpu().T.float(), grouped.dequantized(), rtol=0, atol=0.02)


@cuda
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_rows_are_multiplied_by_the_numbers_themselves(bits: int, device: str) -> None:
    grouped = _weight(bits, 256)
    numbers = (grouped.dequantized() / grouped.scales).round()
    weight = Int4Weight(_on(device, grouped))
    for rows in (torch.eye(256)[:40], torch.eye(256)):
        found = weight.product(rows.bfloat16().to(device), None).cpu().float()
        torch.testing.assert_close(found, (numbers * grouped.scales).bfloat16().float().T[: len(rows)], rtol=0, atol=0)


@cuda
@pytest.mark.parametrize("num_rows", [3, 100])
def test_inputs_in_act_order_are_found(num_rows: int, device: str) -> None:
    grouped = _weight(4, 64)
    grouped.order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    x = torch.randn(num_rows, 256).bfloat16()
    expected = x.float() @ grouped.dequantized().T
    assert _distance(Int4Weight(_on(device, grouped)).product(x.to(device), None).cpu(), expected) < CLOSE / 2


@cuda
def test_swapped_nibbles_would_be_found(device: str) -> None:
    """What the tests above compare can tell a wrong layout."""
    grouped = _weight(4, 64)
    plain, x = grouped.dequantized(), torch.randn(5, 256).bfloat16()
    grouped.numbers = (grouped.numbers << 4) | (grouped.numbers >> 4)
    assert _distance(Int4Weight(_on(device, grouped)).product(x.to(device), None).cpu(), x.float() @ plain.T) > 0.1


@cuda
def test_ranks_have_their_parts_of_one(device: str) -> None:
    """Of outputs to the bit, of inputs but for the order of sums; whole rows' scale is the same on both."""
    for group_size in (64, 256):
        grouped, x = _weight(4, group_size), torch.randn(5, 256).bfloat16()
        whole = Int4Weight(_on(device, grouped)).product(x.to(device), None).cpu()
        outputs = [Int4Weight(_on(device, grouped.narrow(0, start, 24))) for start in (0, 24)]
        assert torch.equal(torch.cat([part.product(x.to(device), None) for part in outputs], 1).cpu(), whole)
        inputs = [Int4Weight(_on(device, grouped.narrow(1, start, 128))) for start in (0, 128)]
        shares = [part.product(own.to(device), None) for part, own in zip(inputs, torch.split(x, 128, 1), strict=True)]
        assert _distance(sum(share.cpu().float() for share in shares), whole.float()) < CLOSE / 4  # type: ignore[arg-type]


@cuda
def test_the_numbers_are_given_up(device: str) -> None:
    grouped = _on(device, _weight(4, 64))
    form = Form(4, 64, has_minima=False)
    packed = Int4Weight(grouped)
    assert packed._packed.nbytes + packed._factors.nbytes == form.card_bytes(48, 256) == 48 * (128 + 4 * 4)
    assert not grouped.numbers.numel() and not grouped.scales.numel() and grouped.minima is None


@pytest.mark.parametrize(
    ("group_size", "num_inputs", "is_taken"),
    [(16, 256, False), (48, 192, False), (32, 64, True), (96, 192, True), (1024, 1024, True), (80, 80, False)],
)
def test_groups_of_32_inputs_and_multiples_are_taken(group_size: int, num_inputs: int, is_taken: bool) -> None:
    assert takes(_weight(4, group_size, num_inputs)) == is_taken


def test_other_types_and_parts_of_tiles_are_not_taken() -> None:
    matrix = torch.randn(48, 64)
    assert not takes(GroupedWeight.quantized(matrix, Form(4, 32, has_minima=False)))
    part = GroupedWeight.quantized(matrix[:44], Form(8, 32, has_minima=False), dtype=torch.bfloat16)
    assert not takes(part)


# --- engines --------------------------------------------------------------------------------------------------------


def _logprobs(engine: Engine, num_tokens: int) -> Tensor:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=8)
    driver = Driver(engine)
    driver.step([(driver.add(prompts([num_tokens], 250)[0], sampling), num_tokens)])
    return torch.tensor([entry.logprob or 0.0 for entry in driver.outputs[0].rows[0].prompt_logprobs])


def _engine(path: Path, *, is_captured: bool = False, **fields: object) -> Engine:
    """Build one; what is asked of most is one prompt's step, for which graphs would take ten times what it takes."""
    defaults = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 8, "max_model_len": 512}
    defaults["enforce_eager"] = not is_captured
    return Engine(engine_config(path, **(defaults | fields)), num_blocks=64)


def _num_packed(engine: Engine) -> int:
    assert isinstance(engine.runner, CudaRunner)
    weights = [linear.weight for linear in engine.runner._decoder.plain.linears()]
    return sum(isinstance(weight, Int4Weight) for weight in weights)


def _be_an_older_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


class Engines(NamedTuple):
    """Engines of one checkpoint: as it is stored on this card and on an older one, and of its numbers on the CPU."""

    packed: Engine
    widened: Engine
    plain: Engine


@pytest.fixture(
    scope="module",
    params=[
        "gptq 4",
        "gptq 4 act-order",
        "gptq 4 asymmetric act-order",
        "gptq 4 whole rows",
        "gptq 8 asymmetric",
        "awq",
        "compressed int4 packed",
        "compressed int4 packed asymmetric",
    ],
)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    stored, plain = write_pair(tmp_path_factory.mktemp("pair"), request.param)
    packed = _engine(stored)
    with pytest.MonkeyPatch.context() as patch:
        _be_an_older_card(patch)
        widened = _engine(stored)
    return Engines(packed, widened, _engine(plain, device="cpu", dtype="float32"))


@pytest.mark.parametrize("num_tokens", [40, 100])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=engine_gpu)])
def test_a_checkpoint_answers_as_its_widened_numbers(
    engines: Engines, num_tokens: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _num_packed(engines.packed) >= 6  # of eight; some formats' configs exclude modules
    assert _num_packed(engines.widened) == 0
    ours = _logprobs(engines.packed, num_tokens)
    assert _rms(ours, _logprobs(engines.plain, num_tokens)) < CLOSE / 2
    _be_an_older_card(monkeypatch)
    assert 0 < _rms(ours, _logprobs(engines.widened, num_tokens)) < CLOSE / 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=engine_gpu)])
def test_floats_of_4_bits_are_widened_in_registers(tmp_path: Path, device: str) -> None:
    stored, plain = write_pair(tmp_path, "compressed nvfp4")
    with capture_logs() as logs:
        found = _engine(stored)
    assert _num_packed(found) == 0
    [entry] = [entry for entry in logs if entry["event"] == "quantized_weights"]
    assert entry["in_registers"] == 7 and "widened" not in entry  # one of eight is fused with a plain part
    assert _rms(_logprobs(found, 40), _logprobs(_engine(plain, device="cpu", dtype="float32"), 40)) < CLOSE / 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=engine_gpu)])
def test_weights_rounded_at_load_answer_as_the_widened_ones(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    with capture_logs() as logs:
        found = _engine(path, quantization="int4")
        _be_an_older_card(monkeypatch)
        widened = _engine(path, quantization="int4")
    assert (_num_packed(found), _num_packed(widened)) == (8, 0)
    assert [entry for entry in logs if entry["event"] == "quantized_weights"] == [
        {"event": "quantized_weights", "log_level": "info", "int4": 8},
        {"event": "quantized_weights", "log_level": "warning", "widened": 8, "reason": "an older card"},
    ]
    monkeypatch.undo()
    assert _rms(_logprobs(found, 60), _logprobs(widened, 60)) < CLOSE / 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=engine_gpu)])
def test_captured_steps_yield_the_tokens_of_launched_ones(tmp_path: Path, device: str) -> None:
    stored, _ = write_pair(tmp_path, "gptq 4 asymmetric act-order")
    answers = []
    for is_captured in (True, False):
        engine = _engine(stored, is_captured=is_captured)
        driver = Driver(engine)
        answers.append(driver.generate([driver.add(prompt) for prompt in prompts([5, 16, 131], 250)]))
        assert isinstance(engine.runner, CudaRunner)
        pipeline = engine.runner.decode_pipeline
        assert pipeline is not None and pipeline.num_steps > 2
    assert answers[0] == answers[1]
