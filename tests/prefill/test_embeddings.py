"""Prompts that are embedded: no grant, nothing shipped or sampled, sums of chunks become one vector."""

from __future__ import annotations

from array import array

import pytest

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.request import Pooling, RequestSpec, SamplingParams, pack_ids
from kvferry.common.vectors import values_of
from kvferry.wire.results import Embedding, TaskRefused, WorkerFailure
from kvferry.wire.tasks import Abort, EmbedTask
from kvferry.wire.workers import LiveRequests

from .test_role import BLOCK, _Bench


def _task(name: str, num_tokens: int, pooling: Pooling = Pooling.LAST, attempt: int = 0, **fields: object) -> EmbedTask:
    spec = RequestSpec(
        request_id=name,
        attempt=attempt,
        prompt=pack_ids(range(num_tokens)),
        sampling=SamplingParams(max_tokens=1),
        **fields,  # type: ignore[arg-type]
    )
    return EmbedTask(spec=spec, pooling=pooling)


def _end(bench: _Bench, batch: Batch, *, is_finite: bool = True) -> None:
    """Every token's state is (1, its id), as whole numbers that add up exactly."""
    rows = []
    for row in batch.rows:
        assert not row.samples
        ids = [row.token_ids[index] for index in row.pooled_tokens]
        pooled = array("f", [len(ids), sum(ids)]).tobytes() if ids else b""
        rows.append(RowOutput((), is_finite=is_finite, pooled=pooled if is_finite else b""))
    bench.role.complete(batch, StepOutput(rows, 0.01, batch.num_tokens))


def _run(bench: _Bench) -> list[int]:
    """Run to the end, and return the tokens of each step."""
    counts = []
    while (batch := bench.begin()) is not None:
        counts.append(batch.num_tokens)
        _end(bench, batch)
    return counts


def _vector(bench: _Bench) -> list[float]:
    message = bench.messages(Embedding)[-1]
    assert isinstance(message, Embedding)
    return values_of(message.vector).tolist()


@pytest.mark.parametrize(
    ("pooling", "first", "second"), [(Pooling.LAST, 1, 17), (Pooling.CLS, 1, 0), (Pooling.MEAN, 18, sum(range(18)))]
)
def test_a_prompt_in_chunks_becomes_one_vector(pooling: Pooling, first: int, second: int) -> None:
    bench = _Bench(budget=8)
    bench.role.on_router_message("R", _task("a", 18, pooling))
    assert len(_run(bench)) > 1
    length = (first**2 + second**2) ** 0.5
    assert _vector(bench) == pytest.approx([first / length, second / length])
    assert not bench.shipping.opened and not bench.shipping.plans and not bench.shipping.finished
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0
    bench.role.check()


@pytest.mark.parametrize("pooling", list(Pooling))
def test_only_the_last_token_does_without_a_prefix(pooling: Pooling) -> None:
    bench = _Bench(budget=64)
    for name in ("a", "b"):
        bench.role.on_router_message("R", _task(name, 18, pooling))
        counts = _run(bench)
    assert counts == [18 % BLOCK if pooling is Pooling.LAST else 18]
    first, again = bench.messages(Embedding)
    assert isinstance(first, Embedding) and isinstance(again, Embedding)
    assert first.vector == again.vector and again.num_cached_tokens == 18 - counts[0]


def test_either_role_embeds() -> None:
    bench = _Bench()
    bench.role.is_active = False
    bench.role.on_router_message("R", _task("a", 5))
    _run(bench)
    assert bench.messages(Embedding) and not bench.messages(TaskRefused)


@pytest.mark.parametrize("reason", ["draining", "expired", "never_fits"])
def test_what_cannot_be_begun_is_refused(reason: str) -> None:
    bench = _Bench(num_blocks=4)
    bench.role.draining = reason == "draining"
    remaining_s = 0.0 if reason == "expired" else None
    bench.role.on_router_message("R", _task("a", 99 if reason == "never_fits" else 5, remaining_s=remaining_s))
    [refusal] = bench.messages(TaskRefused)
    assert isinstance(refusal, TaskRefused) and refusal.reason == reason
    assert bench.role.is_quiet


@pytest.mark.parametrize("is_stepping", [False, True])
@pytest.mark.parametrize("end", ["abort", "router"])
def test_a_client_that_leaves_frees_everything(end: str, is_stepping: bool) -> None:
    bench = _Bench(budget=8)
    bench.role.on_router_message("R", _task("a", 18))
    batch = bench.begin()
    assert batch is not None
    if not is_stepping:
        _end(bench, batch)
    message = Abort(request_id="a", attempt=0) if end == "abort" else LiveRequests(attempts=())
    bench.role.on_router_message("R", message)
    if is_stepping:
        _end(bench, batch)
    assert not bench.messages(Embedding) and bench.pool.num_owned_blocks == 0 and bench.role.is_quiet
    bench.role.check()


def test_a_newer_attempt_begins_anew() -> None:
    bench = _Bench(budget=8)
    bench.role.on_router_message("R", _task("a", 18, Pooling.MEAN))
    batch = bench.begin()
    assert batch is not None
    _end(bench, batch)
    bench.role.on_router_message("R", _task("a", 18, Pooling.MEAN, attempt=1))
    bench.role.on_router_message("R", _task("a", 18, Pooling.MEAN))
    _run(bench)
    [message] = bench.messages(Embedding)
    assert isinstance(message, Embedding) and message.attempt == 1 and bench.role.counters().stale_messages == 1
    length = (18**2 + sum(range(18)) ** 2) ** 0.5
    assert _vector(bench) == pytest.approx([18 / length, sum(range(18)) / length])


def test_states_that_are_no_numbers_end_the_request() -> None:
    bench = _Bench(budget=64)
    bench.role.on_router_message("R", _task("a", 18))
    batch = bench.begin()
    assert batch is not None
    _end(bench, batch, is_finite=False)
    [failure] = bench.messages(WorkerFailure)
    assert isinstance(failure, WorkerFailure) and failure.code == "nonfinite_states"
    assert bench.role.counters().nonfinite_rows == 1 and bench.pool.num_cached_blocks == 0 and bench.role.is_quiet
