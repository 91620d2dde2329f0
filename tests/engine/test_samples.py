"""What steps did, on its way to routers: right, bounded, and an even choice."""

from __future__ import annotations

import itertools

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.samples import MAX_SAMPLES, EvenSamples, RouterSamples, step_sample
from kvferry.wire.workers import StepSample


def _row(num_tokens: int, num_computed: int, num_scheduled: int) -> BatchRow:
    sequence = Sequence(RequestId("r"), 0, 0, [1] * num_tokens, num_tokens, SamplingParams())
    sequence.num_computed_tokens = num_computed
    return BatchRow(sequence, num_scheduled)


def test_a_sample_tells_prompts_from_answers() -> None:
    batch = Batch([_row(10, 9, 1), _row(101, 100, 1), _row(64, 0, 64), _row(300, 100, 50)])
    sample = step_sample(batch, 0.5)
    assert sample == StepSample(
        0.5, prefill_tokens=114, prefill_pairs=64 * 32 + 50 * 125, decode_rows=2, decode_context=111
    )


def _numbered(numbers: range) -> list[StepSample]:
    return [StepSample(float(number)) for number in numbers]


def test_few_are_all_kept_and_many_are_chosen_evenly() -> None:
    for count in (0, 1, 63, 64, 65, 128, 129, 1000, 5000):
        kept = EvenSamples()
        for sample in _numbered(range(count)):
            kept.add(sample)
        times = [sample.step_s for sample in kept.take()]
        assert len(times) == count if count <= MAX_SAMPLES else MAX_SAMPLES // 2 < len(times) <= MAX_SAMPLES
        assert len({b - a for a, b in itertools.pairwise(times)}) <= 1, count
        assert not kept.take()


def test_each_router_gets_those_since_its_own_last_heartbeat() -> None:
    books = RouterSamples()
    books.add(StepSample(1.0))
    assert books.take("a") == (), "nobody listened"
    books.add(StepSample(2.0))
    assert books.take("b") == ()
    books.add(StepSample(3.0))
    assert [sample.step_s for sample in books.take("a")] == [2.0, 3.0]
    assert [sample.step_s for sample in books.take("b")] == [3.0]
    books.forget("a")
    books.add(StepSample(4.0))
    assert books.take("a") == ()
