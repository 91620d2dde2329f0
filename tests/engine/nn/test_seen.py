"""What penalties look at: the same logits to the bit as of a text that is read anew, which no step does."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.request import SamplingParams
from kvferry.engine.cpu.sampling import NativeSampler
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.sampling.sampling import SampleRow, sample, sample_each
from kvferry.engine.sampling.seen import SeenTokens

from ..cuda.torch_kernels import TorchKernels

VOCAB = 40
Edit = Callable[[Tensor, Sequence[SampleRow]], Tensor]  # logits, which it may write to, -> as they are penalized


def on_host() -> Edit:
    seen = SeenTokens()

    def edit(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        sample(logits, rows, frozenset(), seen)
        return logits

    return edit


def on_device() -> Edit:
    sampler = DeviceSampler(torch.device("cpu"), TorchKernels(), frozenset())

    def edit(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        sampler.launch(logits, rows)
        return logits

    return edit


def one_by_one() -> Edit:
    seen = SeenTokens()

    def edit(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        sample_each(logits, rows, frozenset(), seen)
        return logits

    return edit


def natively() -> Edit:
    sampler = NativeSampler(None, frozenset())  # type: ignore[arg-type]  # greedy rows need no library

    def edit(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        sampler.sample(logits, rows)
        return logits

    return edit


everywhere = pytest.mark.parametrize("make", [on_host, on_device, natively])


class Watched(list[int]):
    """A text that counts how many of its tokens are read."""

    num_read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.num_read += len(self)
        return super().__iter__()


def penalized(logits: Tensor, row: SampleRow) -> Tensor:
    """Return a row's logits, by what the penalties are defined as alone."""
    params, text = row.params, [*row.token_ids, *row.draft]
    logits = logits.clone()
    for token in set(text):
        if params.repetition_penalty != 1:
            value = logits[token]
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token, count in Counter(text[row.num_prompt_tokens :]).items():
        logits[token] -= params.frequency_penalty * torch.tensor(float(count)) + params.presence_penalty
    return logits


_params = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
_texts = st.tuples(_params, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
_steps = st.lists(st.tuples(st.lists(st.integers(0, VOCAB - 1), max_size=3), st.integers(1, 40)), max_size=5)


@everywhere
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(_texts, min_size=1, max_size=3), steps=_steps, seed=st.integers(0, 1000))
def test_penalties_are_those_of_the_whole_text(
    make: Callable[[], Edit], texts: list[tuple[SamplingParams, list[int]]], steps: list[Any], seed: int
) -> None:
    """However it grew: by one token, by several at once, behind drafts of which nothing counts, or away for a while."""
    edit, generator = make(), torch.Generator().manual_seed(seed)
    known = [(params, list(prompt), len(prompt)) for params, prompt in texts]
    for turn, (draft, grown) in enumerate([*steps, ([], 1)]):
        some = known if turn % 2 == 0 else known[1:] or known
        ends = range(len(draft) + 1)
        rows = [SampleRow(p, (0,), text, count, None, tuple(draft[:end])) for p, text, count in some for end in ends]
        logits = 3 * torch.randn(len(rows), VOCAB, generator=generator)
        wanted = torch.stack([penalized(*each) for each in zip(logits, rows, strict=True)])
        assert torch.equal(edit(logits, rows), wanted)
        for _, text, _ in some:
            text += torch.randint(0, VOCAB, (grown,), generator=generator).tolist()


@everywhere
@pytest.mark.parametrize("draft", [(), (3, 3, 30)])
def test_a_step_reads_what_has_come_since_the_one_before(make: Callable[[], Edit], draft: tuple[int, ...]) -> None:
    text = Watched(range(30))
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.05, presence_penalty=0.5, bad_words=((1, 2),), min_tokens=50
    )
    rows = [SampleRow(params, (0,), text, 28, None, draft[:end]) for end in range(len(draft) + 1)]
    edit, read = make(), []
    for _ in range(4):
        text.num_read = 0
        edit(torch.zeros(len(rows), VOCAB), rows)
        read.append(text.num_read)
        text.append(7)
    assert read[0] >= 30 and max(read[1:]) <= 3 * len(rows), read


@everywhere
def test_counts_of_the_output_alone_leave_the_prompt_alone(make: Callable[[], Edit]) -> None:
    text = Watched(range(30))
    params = SamplingParams(temperature=0.0, frequency_penalty=0.5)
    edit = make()
    edit(torch.zeros(1, VOCAB), [SampleRow(params, (0,), text, 30)])
    text.append(5)
    edit(torch.zeros(1, VOCAB), [SampleRow(params, (0,), text, 30)])
    assert text.num_read == 1


def test_rows_that_are_sampled_one_by_one_keep_what_each_has_read() -> None:
    texts, seen = [Watched(range(9)) for _ in range(40)], SeenTokens()
    rows = [SampleRow(SamplingParams(temperature=0.0, repetition_penalty=1.1), (0,), text, 5) for text in texts]
    for _ in range(2):
        sample_each(torch.zeros(40, VOCAB), rows, frozenset(), seen)
    assert {text.num_read for text in texts} == {9}


@pytest.mark.parametrize("num_plain", [0, 40])
@pytest.mark.parametrize("make", [on_host, on_device, natively, one_by_one])
def test_texts_that_are_gone_are_forgotten(make: Callable[[], Edit], num_plain: int) -> None:
    edit, params = make(), SamplingParams(temperature=0.0, repetition_penalty=1.1)
    texts = [Watched(range(9)) for _ in range(40)]
    edit(torch.zeros(40, VOCAB), [SampleRow(params, (0,), text, 5) for text in texts])
    gone, stays = [weakref.ref(text) for text in texts[1:]], texts[0]
    del texts
    plain = [SampleRow(SamplingParams(temperature=0.0), (0,), Watched(range(9)), 5) for _ in range(num_plain)]
    edit(torch.zeros(num_plain + 1, VOCAB), [SampleRow(params, (0,), stays, 5), *plain])
    assert not any(text() for text in gone) and stays.num_read == 9


@pytest.mark.parametrize("make", [on_host, on_device, natively, one_by_one])
def test_rows_without_penalties_let_texts_be_forgotten(make: Callable[[], Edit]) -> None:
    edit, params = make(), SamplingParams(temperature=0.0, repetition_penalty=1.1)
    texts = [Watched(range(9)) for _ in range(40)]
    edit(torch.zeros(40, VOCAB), [SampleRow(params, (0,), text, 5) for text in texts])
    gone = [weakref.ref(text) for text in texts]
    del texts
    edit(torch.zeros(1, VOCAB), [SampleRow(SamplingParams(temperature=0.0), (0,), [3, 4], 1)])
    assert not any(text() for text in gone)
