"""Sampling without waiting for the device: the same tokens and log-probabilities as on the host."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cuda.kernels import FusedKernels, Kernels
from kvferry.engine.cuda.sampling import DeviceSampler, invert
from kvferry.engine.sampling.sampling import SampleRow, sample
from kvferry.tests.sampled import assert_same

from .torch_kernels import TorchKernels

VOCAB = 700
EOS = frozenset({1, 3})
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"
)

_runs = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.2, 0.001]),
    top_k=st.sampled_from([0, 1, 5, 100, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {5: 4.0, 6: -100.0, 99_999: 1.0}]),
    min_tokens=st.sampled_from([0, 8]),
    stop_token_ids=st.sampled_from([(), (2, 7)]),
    bad_words=st.sampled_from([(), ((5,), (9, 4), (99_999,))]) | st.lists(_runs, max_size=4).map(tuple),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 2**40),
)
_rows = st.builds(
    SampleRow,
    params=_params,
    choices=st.sampled_from([(0,), (2,), (0, 1, 2)]),
    token_ids=st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=12),
    num_prompt_tokens=st.integers(1, 3),
)


def _logits(num_rows: int, seed: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def _on_device(
    logits: torch.Tensor, rows: list[SampleRow], device: str = "cpu", kernels: Kernels | None = None
) -> list[tuple[SampledToken, ...]]:
    sampler = DeviceSampler(torch.device(device), kernels or TorchKernels(), EOS)
    draws = sampler.launch(logits.to(device), rows)
    if device == "cuda":
        torch.cuda.synchronize()
    return draws.read()


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(_rows, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_tokens_are_those_of_the_host(rows: list[SampleRow], seed: int) -> None:
    logits = _logits(len(rows), seed)
    assert_same(_on_device(logits.clone(), rows), sample(logits, rows, EOS))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu, needs_flashinfer])])
@pytest.mark.parametrize("vocab_size", [VOCAB, 128_256])
def test_the_first_of_equal_logits_is_the_best(device: str, vocab_size: int) -> None:
    """On every device, so that a greedy stream goes on the same elsewhere; drawn tokens lie in the same order."""
    kernels = FusedKernels() if device == "cuda" else TorchKernels()
    logits = _logits(6, 0, vocab_size)
    places = [(1, 2), (0, vocab_size - 1), (255, 256), (300, 301), (5, 690), (vocab_size - 2, vocab_size - 1)]
    for row, tied in enumerate(places):
        logits[row, list(tied)] = 50.0
    greedy = [SampleRow(SamplingParams(temperature=0.0), (0,), [4, 5], 1) for _ in places]
    found = _on_device(logits.clone(), greedy, device, kernels)
    assert [tokens[0].token_id for tokens in found] == [first for first, _ in places]
    drawn = [SampleRow(SamplingParams(seed=seed, top_k=1), (0,), [4, 5], 1) for seed in range(6)]
    assert_same(_on_device(logits.clone(), drawn, device, kernels), sample(logits, drawn, EOS))


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    rows = [SampleRow(SamplingParams(seed=seed, top_p=0.9), (0,), [4, 5], 1) for seed in range(20)]
    logits = _logits(20, 0)
    together = _on_device(logits.clone(), rows)
    alone = [_on_device(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(20)]
    assert together == alone
    assert len({tokens[0].token_id for tokens in together}) > 5


@settings(max_examples=50, deadline=None)
@given(data=st.data(), num_chunks=st.integers(1, 4), width=st.integers(-3, 3))
def test_a_draw_falls_where_the_cumulative_weight_passes_it(data: st.DataObject, num_chunks: int, width: int) -> None:
    vocab_size = num_chunks * 256 + width
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    weights = torch.rand(3, vocab_size, generator=generator)
    weights[torch.rand(3, vocab_size, generator=generator) < 0.7] = 0.0
    weights[:, data.draw(st.integers(0, vocab_size - 1))] = 1.0
    draws = torch.tensor(np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=12))))
    draws = draws.view(3, 4)
    found = invert(weights, draws)
    cumulative = weights.double().cumsum(-1)
    points = draws * cumulative[:, -1:]
    assert bool((weights.gather(1, found) > 0).all())
    at = cumulative.gather(1, found)
    assert bool((at >= points - 1e-9).all()) and bool((at - weights.gather(1, found) <= points + 1e-9).all())


def test_the_last_token_with_weight_is_the_end() -> None:
    weights = torch.zeros(1, 600)
    weights[0, [3, 599]] = torch.tensor([1.0, 1e-30])
    assert invert(weights, torch.tensor([[0.0, 1.0 - 2**-53]], dtype=torch.float64)).tolist() == [[3, 3]]
    weights[0, 599] = 1.0
    assert invert(weights, torch.tensor([[0.0, 0.5, 1.0 - 2**-53]], dtype=torch.float64)).tolist() == [[3, 599, 599]]


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
@pytest.mark.parametrize(("vocab_size", "num_seeds"), [(VOCAB, 20), (32_000, 10), (128_256, 3)])
def test_seeded_rows_draw_on_a_gpu_as_on_the_host(vocab_size: int, num_seeds: int) -> None:
    kernels = FusedKernels()
    tokens = list(range(2, 12))
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.7, top_p=0.9),
        SamplingParams(seed=3, top_k=40),
        SamplingParams(seed=4, top_k=50, top_p=0.95, min_p=0.02),
        SamplingParams(seed=5, min_p=0.1, logprobs=5),
        SamplingParams(seed=6, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1),
        SamplingParams(temperature=0.0, logit_bias={7: 50.0}, min_tokens=20, logprobs=0),
    ]
    rows = [SampleRow(each, (0, 1) if index % 2 else (0,), tokens, 4) for index, each in enumerate(params)]
    for seed in range(num_seeds):
        logits = _logits(len(rows), seed, vocab_size)
        assert_same(_on_device(logits.clone(), rows, "cuda", kernels), sample(logits, rows, EOS))


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
def test_masks_on_a_gpu_keep_what_torch_keeps() -> None:
    fused, reference = FusedKernels(), TorchKernels()
    logits = _logits(6, 0, 32_000).cuda()
    counts = torch.tensor([1, 7, 50, 1000, 31_999, 32_000], dtype=torch.int32, device="cuda")
    assert torch.equal(fused.keep_top_k(logits, counts), reference.keep_top_k(logits, counts))
    probs = logits.softmax(-1)
    limits = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.99, 0.999], device="cuda")
    torch.testing.assert_close(fused.keep_top_p(probs, limits), reference.keep_top_p(probs, limits))
