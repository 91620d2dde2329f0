"""The kernels that a GPU worker stands on, each against torch in float32 at Llama-3-8B's shapes.

    python -m kvferry.benchmarks.gpu.kernels --json FILE

- attention over pages (HND): decode rows, prompts, chunks that continue a prompt, all in one step, by the worker's
  backend for GPUs and by its backend for CPUs; over latents too, at DeepSeek-V3's shape on one rank of eight;
- the fused kernels: norms with and without the residual, rotation from a table, gated activation, logits;
- adapters of many rows beside a product, in a graph; rows of many experts in one product, with adapters too;
- sampling: the same draws on the card as on the CPU.

The first run on a machine compiles each kernel, a minute or so in all; FlashInfer keeps them in its cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from kvferry.benchmarks.gpu.agreement import agreement, random_rows
from kvferry.benchmarks.gpu.expert_products import check_adapted_experts, check_experts, check_float8_experts
from kvferry.benchmarks.shared.checks import run_checks
from kvferry.common.adapter import NO_ADAPTER
from kvferry.common.request import SamplingParams
from kvferry.engine.cuda.adapters import DeviceSlots
from kvferry.engine.cuda.kernels import FusedKernels, Kernels
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.nn.attention.base import AttentionMetadata, Scores
from kvferry.engine.nn.attention.choose import make_attention
from kvferry.engine.nn.layers import Linear
from kvferry.engine.sampling.sampling import SampleRow, sample
from kvferry.engine.weights.slot_matrices import AdapterWeights, LinearPart, Pair
from kvferry.engine.weights.weight import DenseWeight

_QO_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 16
_LATENT, _TURNED, _LATENT_HEADS = 512, 64, 16
_HIDDEN, _MLP, _VOCAB = 4096, 14336, 128256
# (tokens before, tokens fed) of each row; rows of one token first.
_ROWS = ((0, 1), (15, 1), (16, 1), (999, 1), (4095, 1), (0, 64), (700, 300), (33, 17))
_MAX_POSITION = 8192
_LORA_RANKS = (8, 64, 13)
_EPS = 1e-5
_MIN_EQUAL_DRAWS = 0.99


def metadata_of(rows: tuple[tuple[int, int], ...], block_size: int, seed: int = 0) -> tuple[AttentionMetadata, int]:
    """A step of these rows over scattered blocks, and how many blocks there are."""
    starts, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    ends = starts + lengths
    num_pages = (ends + block_size - 1) // block_size
    num_blocks = int(num_pages.sum())
    block_ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
    kv_indptr = torch.cat((torch.zeros(1, dtype=torch.int32), num_pages.cumsum(0).int()))
    slots = []
    for (start, length), first in zip(rows, kv_indptr.tolist(), strict=False):
        positions = torch.arange(start, start + length)
        slots.append(block_ids[first + positions // block_size].long() * block_size + positions % block_size)
    metadata = AttentionMetadata(
        num_decode_rows=sum(length == 1 for _, length in rows),
        qo_indptr=torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int())),
        paged_kv_indptr=kv_indptr,
        paged_kv_indices=block_ids,
        paged_kv_last_page_len=(ends - 1) % block_size + 1,
        kv_lens=tuple(ends.tolist()),
        slot_mapping=torch.cat(slots),
    )
    return metadata, num_blocks


def check_attention(device: torch.device, window: int | None) -> str:
    metadata, num_blocks = metadata_of(_ROWS, _BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    pages = torch.randn(1, num_blocks, 2, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM, generator=generator).bfloat16()
    shape = (metadata.num_tokens, _QO_HEADS + 2 * _KV_HEADS, _HEAD_DIM)
    heads = torch.randn(shape, generator=generator).bfloat16()
    results = []
    for target, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        copy = pages.to(target, dtype)
        backend = make_attention("auto", copy, _QO_HEADS, [window])
        backend.plan(metadata)
        q, k, v = torch.split(heads.to(target, dtype), [_QO_HEADS, _KV_HEADS, _KV_HEADS], 1)
        results.append((backend.forward(q, k, v, 0).float().cpu(), copy.float().cpu()))
    (out, written), (expected, expected_pages) = results
    torch.testing.assert_close(written, expected_pages, rtol=0, atol=0)
    return agreement(out, expected)


def check_latents(device: torch.device) -> str:
    metadata, num_blocks = metadata_of(_ROWS, _BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    pages = torch.randn(1, num_blocks, 1, 1, _BLOCK_SIZE, _LATENT + _TURNED, generator=generator).bfloat16()
    heads = torch.randn(metadata.num_tokens, _LATENT_HEADS + 1, _LATENT + _TURNED, generator=generator).bfloat16()
    results = []
    for target, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        copy = pages.to(target, dtype)
        backend = make_attention("auto", copy, _LATENT_HEADS, [None], scores=Scores(scale=0.05, value_dim=_LATENT))
        backend.plan(metadata)
        q, kept = torch.split(heads.to(target, dtype), [_LATENT_HEADS, 1], 1)
        results.append((backend.forward(q, kept, kept[..., :_LATENT], 0).float().cpu(), copy.float().cpu()))
    (out, written), (expected, expected_pages) = results
    torch.testing.assert_close(written, expected_pages, rtol=0, atol=0)
    return agreement(out, expected)


def check_norms(device: torch.device, kernels: Kernels) -> str:
    x, residual = (random_rows(500, _HIDDEN, device=device, seed=seed) for seed in (1, 2))
    weight = random_rows(_HIDDEN, device=device, seed=3)
    agreement(kernels.rms_norm(x, weight, _EPS), _norm(x, weight))
    heads, head_weight = random_rows(500, _QO_HEADS, _HEAD_DIM, device=device, seed=9), weight[:_HEAD_DIM].contiguous()
    expected = _norm(heads, head_weight)
    kernels.norm_heads_(heads, head_weight, _EPS)
    agreement(heads, expected)
    total = x.float() + residual.float()
    expected = _norm(total, weight)
    kernels.add_norm_(x, residual, weight, _EPS)
    agreement(residual, total)
    return agreement(x, expected)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), _EPS)


def check_rotation(device: torch.device, kernels: Kernels) -> str:
    num_tokens, half = 300, _HEAD_DIM // 2
    positions = torch.randint(0, _MAX_POSITION, (num_tokens,), generator=torch.Generator().manual_seed(4)).to(device)
    inverse = 500_000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(_MAX_POSITION, device=device).unsqueeze(1) * inverse  # [positions, head_dim / 2]
    table = torch.cat((angles.cos(), angles.sin()), 1)
    fused = random_rows(num_tokens, _QO_HEADS + 2 * _KV_HEADS, _HEAD_DIM, device=device, seed=5)
    q, k, v = torch.split(fused, [_QO_HEADS, _KV_HEADS, _KV_HEADS], 1)  # views of one product's rows, as in a layer
    expected = [_rotated(heads.float(), table[positions]) for heads in (q, k)] + [v.float()]
    kernels.rotate_(q, k, positions.int(), table)
    return agreement(torch.cat((q, k, v), 1), torch.cat(expected, 1))


def _rotated(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) of each head [tokens, heads, head_dim] turned by their position's angle."""
    cos, sin = (part.unsqueeze(1) for part in cos_sin.chunk(2, 1))
    low, high = heads.chunk(2, 2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), 2)


def check_activation(device: torch.device, kernels: Kernels) -> str:
    gate_up = random_rows(300, 2 * _MLP, device=device, seed=7)
    gate, up = gate_up.float().chunk(2, 1)
    return agreement(kernels.silu_and_mul(gate_up), torch.nn.functional.silu(gate) * up)


def check_logits(device: torch.device, kernels: Kernels, vocab_size: int = _VOCAB) -> str:
    hidden = random_rows(64, _HIDDEN, device=device, seed=10)
    weight = random_rows(vocab_size, _HIDDEN, device=device, seed=11).div_(_HIDDEN**0.5)
    expected = hidden.float().cpu() @ weight.float().cpu().t()  # a card may multiply float32 in fewer bits
    out = kernels.logits(hidden, weight).cpu()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    return f"largest difference {float((out - expected).abs().max()):.1e}"


class _Adapted(Linear):
    """A linear of one module."""

    def parts_of_rank(self) -> Iterator[LinearPart]:
        rows = slice(0, self.weight.num_outputs)
        yield LinearPart(self.name, (self.weight.num_outputs, self.weight.num_inputs), rows, (rows,))


class _AdaptedModel:
    """Implements `AdaptedModel`."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def linears(self) -> Iterator[Linear]:
        yield self._linear


def check_adapters(device: torch.device) -> str:
    num_rows, num_slots = 64, len(_LORA_RANKS)
    linear = _Adapted("q", DenseWeight(random_rows(_HIDDEN, _HIDDEN, device=device, seed=12).div_(_HIDDEN**0.5)))
    slots = DeviceSlots(_AdaptedModel(linear), num_slots=num_slots, max_rank=max(_LORA_RANKS), device=device)
    host = torch.device("cpu")
    pairs = []
    for slot, rank in enumerate(_LORA_RANKS):
        down, up = (random_rows(*shape, device=host, seed=20 + slot) for shape in ((rank, _HIDDEN), (_HIDDEN, rank)))
        pairs.append(Pair(down.div_(_HIDDEN**0.5), up.div_(rank**0.5)))
        slots.put(slot, AdapterWeights({"q": pairs[-1]}))
    x = random_rows(num_rows, _HIDDEN, device=device, seed=13)
    chosen = torch.full((num_rows,), NO_ADAPTER, dtype=torch.int32, device=device)

    def run() -> Tensor:
        slots.rows.begin(chosen)
        return linear(x)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    chosen.copy_(torch.arange(num_rows) % (num_slots + 1) - 1)
    graph.replay()
    assert isinstance(linear.weight, DenseWeight)
    wide = x.float().cpu()
    expected = wide @ linear.weight.plain.float().cpu().t()
    for row, slot in enumerate(chosen.tolist()):
        if slot != NO_ADAPTER:
            expected[row] += (wide[row] @ pairs[slot].down.float().t()) @ pairs[slot].up.float().t()
    return agreement(y.cpu(), expected)


def check_sampling(device: torch.device, kernels: Kernels, vocab_size: int = _VOCAB) -> str:
    """Draws depend on seed and position alone, so the card must draw what the CPU draws, but for sums rounded in
    another order where a draw falls between two tokens."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=50),
        SamplingParams(temperature=1.0, min_p=0.05, repetition_penalty=1.1, frequency_penalty=0.5),
    ]
    logits = torch.randn(128, vocab_size, generator=torch.Generator().manual_seed(8)) * 4
    rows = [
        SampleRow(_with_seed(params[index % len(params)], index), (0, 1), [3, 5, 7, index], 2)
        for index in range(len(logits))
    ]
    ends = frozenset({2})
    draws = DeviceSampler(device, kernels, ends).launch(logits.clone().to(device), rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    drawn = [token.token_id for tokens in draws.read() for token in tokens]
    expected = [token.token_id for tokens in sample(logits, rows, ends) for token in tokens]
    num_equal = sum(a == b for a, b in zip(drawn, expected, strict=True))
    found = f"{num_equal} of {len(expected)} draws are the CPU's"
    assert num_equal >= _MIN_EQUAL_DRAWS * len(expected), found
    return found


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(**{field: getattr(params, field) for field in params.__struct_fields__} | {"seed": seed})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.benchmarks.gpu.kernels")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, default=_VOCAB, metavar="N", help="(default: %(default)s)")
    flags = parser.parse_args(argv)
    device, console = torch.device("cuda"), Console(stderr=True)
    with torch.inference_mode():
        kernels = FusedKernels()
        named: dict[str, Callable[[], str]] = {
            "attention": lambda: check_attention(device, None),
            "sliding window": lambda: check_attention(device, 500),
            "latents": lambda: check_latents(device),
            "norms": lambda: check_norms(device, kernels),
            "rotation": lambda: check_rotation(device, kernels),
            "activation": lambda: check_activation(device, kernels),
            "logits": lambda: check_logits(device, kernels, flags.vocab_size),
            "adapters": lambda: check_adapters(device),
            "experts": lambda: check_experts(device),
            "experts in 8 bits": lambda: check_float8_experts(device),
            "adapters of experts": lambda: check_adapted_experts(device),
            "sampling": lambda: check_sampling(device, kernels, flags.vocab_size),
        }
        checks = run_checks(flags.json, named, console)
    return 0 if all(check.is_ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
