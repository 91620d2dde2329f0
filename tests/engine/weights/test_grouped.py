"""Quantized weights in their one form: rounding, the plain numbers they stand for, parts of them for ranks and rows."""

from __future__ import annotations

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.engine.weights import grouped
from kvferry.engine.weights.grouped import E2M1, GroupedWeight, join_nibbles, split_nibbles
from kvferry.engine.weights.weight import PIECE_ROWS
from kvferry.models.storage import Form

MATRIX = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
SCHEMES = [
    (bits, group_size, symmetric) for bits in (4, 8) for group_size in (16, 32, 128) for symmetric in (True, False)
]
FLOATS = Form(4, 16, has_minima=False, is_e2m1=True)


def _quantized(bits: int, group_size: int, *, symmetric: bool) -> GroupedWeight:
    return GroupedWeight.quantized(MATRIX, Form(bits, group_size, not symmetric))


def _empty(form: Form) -> GroupedWeight:
    return GroupedWeight.empty(48, 128, form, dtype=torch.float32, device=torch.device("cpu"))


def _floats() -> GroupedWeight:
    return GroupedWeight.quantized(MATRIX, FLOATS)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_each_number_is_the_nearest_of_its_group(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _quantized(bits, group_size, symmetric=symmetric)
    assert (weight.bits, weight.group_size, weight.num_inputs) == (bits, group_size, 128)
    assert (weight.minima is None) == symmetric
    error = (weight.dequantized() - MATRIX).view(24, -1, group_size).abs().amax(2)
    # A symmetrical group of 4 bits has -8 but no 8: what is as large as its largest, of the other sign, is a step off.
    steps = 1.0 if symmetric and bits == 4 else 0.5
    assert torch.all(error <= steps * weight.scales.abs() * 1.0001)


def test_each_float_of_4_bits_is_the_nearest_of_its_group() -> None:
    weight = _floats()
    reach = MATRIX.view(24, -1, 16).abs().amax(2, keepdim=True)
    every = torch.tensor(E2M1) * reach.unsqueeze(3) / 6  # what each number's group can hold
    wanted = (every - MATRIX.view(24, -1, 16, 1)).abs().amin(3)
    assert torch.allclose((weight.dequantized() - MATRIX).view(24, -1, 16).abs(), wanted, rtol=0, atol=1e-6)
    zeros = GroupedWeight.quantized(torch.zeros(4, 128), FLOATS)
    assert not zeros.dequantized().any()


def test_whole_numbers_are_not_taken_for_floats_of_8_bits() -> None:
    with pytest.raises(AssertionError, match="to_float8"):
        GroupedWeight.quantized(MATRIX, Form(8, 128, has_minima=False, is_e4m3=True))


def test_4_bits_mean_floats() -> None:
    every = GroupedWeight(
        torch.arange(256).to(torch.uint8).view(16, 16), torch.ones(16, 1), dtype=torch.float32, is_e2m1=True
    )
    pairs = every.dequantized().flatten().view(256, 2)
    assert torch.equal(pairs, torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]))


def test_floats_of_4_bits_are_twice_whole_numbers() -> None:
    weight = _floats()
    for has_minima in (False, True):
        raised = weight.raised(Form(8, 16, has_minima))
        assert raised.bits == 8 and not raised.is_e2m1
        assert torch.equal(raised.dequantized(), weight.dequantized())
    halves = [weight.narrow(1, start, 64).dequantized() for start in (0, 64)]
    assert torch.equal(torch.cat(halves, 1), weight.dequantized())
    nibbles = _quantized(4, 32, symmetric=True)
    fused = _empty(Form(8, 16, has_minima=False))
    fused.put(slice(0, 24), weight)
    fused.put(slice(24, 48), nibbles)
    assert torch.equal(fused.dequantized(), torch.cat([weight.dequantized(), nibbles.dequantized()]))


def test_zeros_stay_zeros() -> None:
    for bits, group_size, symmetric in SCHEMES:
        zeros = GroupedWeight.quantized(torch.zeros(4, 128), Form(bits, group_size, not symmetric))
        assert not zeros.dequantized().any()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_a_product_is_that_of_the_plain_numbers(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _quantized(bits, group_size, symmetric=symmetric)
    x, bias = torch.randn(5, 128), torch.randn(24)
    wanted = x @ weight.dequantized().T + bias
    assert torch.allclose(weight.product(x, bias), wanted, atol=1e-5)
    weight.pack()
    assert not weight.numbers.numel()
    assert torch.allclose(weight.product(x, bias), wanted, atol=1e-5)


def test_act_order_says_where_each_input_stands() -> None:
    plain = _quantized(4, 32, symmetric=True)
    order = torch.randperm(128).to(torch.int32)
    weight = GroupedWeight(plain.numbers, plain.scales, order=order, dtype=torch.float32)
    x = torch.randn(3, 128)
    assert torch.allclose(weight.product(x, None), plain.product(x[:, order.long()], None), atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_raising_changes_no_weight(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _quantized(bits, group_size, symmetric=symmetric)
    wanted = weight.dequantized()
    for has_minima in (not symmetric, True):
        raised = weight.raised(Form(8, 16, has_minima))
        assert (raised.bits, raised.group_size, raised.minima is not None) == (8, 16, has_minima)
        assert torch.allclose(raised.dequantized(), wanted, rtol=0, atol=1e-6)  # one addition more is rounded
        same = weight.raised(Form(bits, group_size, has_minima))
        assert torch.allclose(same.dequantized(), wanted, rtol=0, atol=1e-6)


def test_parts_of_other_kinds_are_put_beside_one_another() -> None:
    fused = _empty(Form(8, 16, has_minima=True))
    nibbles, bytes_ = _quantized(4, 32, symmetric=False), _quantized(8, 16, symmetric=True)
    fused.put(slice(0, 24), nibbles)
    fused.put(slice(24, 48), bytes_)
    wanted = torch.cat([nibbles.dequantized(), bytes_.dequantized()])
    assert torch.allclose(fused.dequantized(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_ranks_share_outputs_and_whole_groups_of_inputs(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _quantized(bits, group_size, symmetric=symmetric)
    wanted = weight.dequantized()
    assert torch.equal(weight.narrow(0, 8, 8).dequantized(), wanted[8:16])
    halves = [weight.narrow(1, start, 64).dequantized() for start in (0, 64)]
    assert torch.equal(torch.cat(halves, 1), wanted)


def test_a_cut_group_is_refused() -> None:
    weight = _quantized(4, 32, symmetric=True)
    told = "16 inputs of 128 are no whole groups of 32; .*--tensor-parallel-size or .*--prefill-tensor-parallel-size"
    with pytest.raises(ConfigError, match=told):
        weight.narrow(1, 16, 16)
    ordered = GroupedWeight(weight.numbers, weight.scales, order=torch.arange(128).int(), dtype=torch.float32)
    with pytest.raises(ConfigError, match="act-order"):
        ordered.narrow(1, 0, 64)


def test_fused_parts_have_one_act_order() -> None:
    weight = _empty(Form(4, 32, has_minima=False))
    plain = _quantized(4, 32, symmetric=True)
    weight.put(slice(0, 24), plain)
    ordered = GroupedWeight(plain.numbers, plain.scales, order=torch.arange(128).int(), dtype=torch.float32)
    with pytest.raises(ConfigError, match="act-order"):
        weight.put(slice(24, 48), ordered)


def _told(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> list[int]:
    """Count the rows of what a function is given, in each call."""
    seen, made = [], getattr(place, name)

    def counted(what: torch.Tensor | GroupedWeight, *args: object, **kwargs: object) -> object:
        seen.append(what.num_outputs if isinstance(what, GroupedWeight) else len(what))
        return made(what, *args, **kwargs)

    monkeypatch.setattr(place, name, counted)
    return seen


@pytest.mark.parametrize("is_e2m1", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_large_matrix_is_rounded_and_widened_in_pieces(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, is_e2m1: bool
) -> None:
    """So that it is never there in float32, which takes twice its room, or eight times that of 4 bits."""
    matrix = torch.randn(2 * PIECE_ROWS + 40, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    form = Form(4, 16, not symmetric and not is_e2m1, is_e2m1)
    rounded = _told(monkeypatch, grouped, "round_groups")
    weight = GroupedWeight.quantized(matrix, form)
    assert rounded == [PIECE_ROWS, PIECE_ROWS, 40] and weight.dtype == torch.bfloat16
    parts = [GroupedWeight.quantized(matrix[at : at + 7], form).dequantized() for at in range(0, len(matrix), 7)]
    plain = weight.dequantized()
    assert torch.equal(plain, torch.cat(parts))
    widened = _told(monkeypatch, GroupedWeight, "dequantized")
    assert torch.equal(weight.widened(), plain.bfloat16())
    assert widened == [PIECE_ROWS, PIECE_ROWS, 40]
    for dim, start, size in ((0, 1000, (1050, 32)), (1, 4, (len(matrix), 8))):  # a part of a group, too
        target = torch.empty(size)
        weight.widen_into(target, dim, start)
        assert torch.equal(target, plain.narrow(dim, start, size[dim]))
    assert max(widened) <= PIECE_ROWS


def test_nibbles() -> None:
    numbers = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    joined = join_nibbles(numbers)
    assert joined.shape == (3, 4) and int(joined[0, 0] & 15) == int(numbers[0, 0])
    assert torch.equal(split_nibbles(joined), numbers)
