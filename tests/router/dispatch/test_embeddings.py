"""Embeddings on their way through the dispatcher: one worker, one message back, computed anew where that is lost."""

from __future__ import annotations

from array import array

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.request import Pooling
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.results import Embedding, TaskRefused, WorkerFailure
from kvferry.wire.tasks import Abort, EmbedTask
from kvferry.wire.workers import Goodbye

from ..fleet import Fleet, Link, config, received, tokens

VECTOR = array("f", [0.6, 0.8]).tobytes()


def _embed(fleet: Fleet, num_tokens: int = 20, **fields: object) -> TokenStream:
    return fleet.submit(num_tokens, max_tokens=1, pooling=Pooling.LAST, **fields)


def _answer(fleet: Fleet, link: Link, task: EmbedTask) -> None:
    message = Embedding(
        request_id=task.spec.request_id,
        attempt=task.spec.attempt,
        vector=VECTOR,
        num_cached_tokens=16,
        prefill_s=0.1,
        queue_s=0.05,
    )
    fleet.dispatcher.on_message(link, message)


def test_a_prefill_worker_answers_and_nobody_else_hears_of_it() -> None:
    fleet = Fleet()
    prefill, decode = fleet.join("p-0"), fleet.join("d-0")
    stream = _embed(fleet)
    task = prefill.take(EmbedTask)
    assert task.pooling is Pooling.LAST
    fleet.clock.advance(0.2)
    _answer(fleet, prefill, task)
    [end] = received(stream)
    assert end.tokens == () and end.finish == "stop" and stream.is_exhausted()
    request = stream.request
    assert request.embedding == VECTOR and request.status is RequestStatus.FINISHED
    assert (request.prefill_worker, request.decode_worker) == ("p-0", None)
    assert request.num_cached_tokens == 16 and request.num_output_tokens == 0
    assert not prefill.sent and not decode.sent, "who has answered needs no Abort"
    assert fleet.observer.placed["least_loaded", "embedding"] == 1
    [outcome] = fleet.observer.outcomes
    assert outcome.ttft_s == pytest.approx(0.2) and outcome.tpot_s is None
    assert fleet.dispatcher.breaches() == []
    assert not any(worker.num_bound for worker in fleet.dispatcher.view().workers)


def test_without_a_prefill_pool_a_decode_worker_answers() -> None:
    fleet = Fleet(config(expect_prefill=False))
    decode = fleet.join("d-0")
    stream = _embed(fleet)
    _answer(fleet, decode, decode.take(EmbedTask))
    assert stream.request.embedding == VECTOR
    assert (stream.request.prefill_worker, stream.request.decode_worker) == (None, "d-0")


def test_another_worker_computes_anew_what_was_lost() -> None:
    fleet = Fleet()
    first, second = fleet.join("p-0"), fleet.join("p-1")
    stream = _embed(fleet)
    lost = first.take(EmbedTask)
    fleet.dispatcher.worker_left(first, "connection lost")
    fleet.wait(0.5, second)
    task = second.take(EmbedTask)
    assert task.spec.attempt == 1 and task.spec.prompt == lost.spec.prompt
    _answer(fleet, second, task)
    assert stream.request.embedding == VECTOR and stream.request.num_failures == 1
    assert fleet.observer.retries["prefill", "worker_lost"] == 1


def test_a_worker_that_ends_by_itself_is_no_failure() -> None:
    fleet = Fleet()
    first, second = fleet.join("p-0"), fleet.join("p-1")
    stream = _embed(fleet)
    first.take(EmbedTask)
    fleet.dispatcher.on_message(first, Goodbye())
    fleet.dispatcher.worker_left(first, "connection closed")
    fleet.wait(0.2, second)
    _answer(fleet, second, second.take(EmbedTask))
    assert stream.request.embedding == VECTOR and stream.request.num_failures == 0


def test_a_refusal_sends_it_elsewhere() -> None:
    fleet = Fleet()
    first, second = fleet.join("p-0"), fleet.join("p-1")
    stream = _embed(fleet)
    task = first.take(EmbedTask)
    refusal = TaskRefused(request_id=task.spec.request_id, attempt=0, reason="draining")
    fleet.dispatcher.on_message(first, refusal)
    fleet.wait(0.2, second)
    _answer(fleet, second, second.take(EmbedTask))
    assert stream.request.embedding == VECTOR and stream.request.num_failures == 0


def test_a_client_that_leaves_is_told_to_the_worker() -> None:
    fleet = Fleet()
    prefill = fleet.join("p-0")
    stream = _embed(fleet)
    task = prefill.take(EmbedTask)
    stream.abort()
    prefill.take(Abort)
    _answer(fleet, prefill, task)
    assert stream.request.status is RequestStatus.ABORTED and not stream.request.embedding
    assert fleet.observer.dropped["unknown_request"] == 1


def test_late_vectors_of_earlier_attempts_and_tokens_are_dropped() -> None:
    fleet = Fleet()
    first, second = fleet.join("p-0"), fleet.join("p-1")
    stream = _embed(fleet)
    old = first.take(EmbedTask)
    fleet.dispatcher.on_message(first, WorkerFailure(request_id=old.spec.request_id, attempt=0, reason="out of memory"))
    fleet.wait(0.5, first, second)
    link = first if any(isinstance(message, EmbedTask) for message in first.sent) else second
    task = next(message for message in link.sent if isinstance(message, EmbedTask))
    _answer(fleet, first, old)
    assert fleet.observer.dropped["stale_attempt"] == 1
    fleet.step(link, task, tokens(0, 0, 1))  # type: ignore[arg-type]
    assert fleet.observer.dropped["out_of_turn"] == 1
    _answer(fleet, link, task)
    assert stream.request.embedding == VECTOR and stream.request.num_output_tokens == 0


def test_a_failure_that_every_worker_would_have_is_told() -> None:
    fleet = Fleet()
    prefill = fleet.join("p-0")
    stream = _embed(fleet)
    task = prefill.take(EmbedTask)
    failure = WorkerFailure(request_id=task.spec.request_id, attempt=0, reason="NaN", code="nonfinite_states")
    fleet.dispatcher.on_message(prefill, failure)
    with pytest.raises(StreamError, match="NaN"):
        stream.is_exhausted()


def test_a_prompt_that_no_worker_can_hold_is_refused() -> None:
    fleet = Fleet()
    fleet.join("p-0", num_blocks=2)
    fleet.join("d-0", num_blocks=2)
    assert _embed(fleet, 32)
    with pytest.raises(RequestError, match="33 prompt tokens"):
        _embed(fleet, 33)


def test_a_mean_looks_for_no_prefix() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    assert _embed(fleet, 40).request.block_hashes
    mean = fleet.submit(40, max_tokens=1, pooling=Pooling.MEAN)
    assert not mean.request.block_hashes


@pytest.mark.parametrize("num_ahead", [1, 200])
async def test_answers_that_wait_for_a_decode_worker_do_not_hold_embeddings_up(num_ahead: int) -> None:
    fleet = Fleet()
    prefill = fleet.join("p-0", max_num_batched_tokens=64)
    answers = [fleet.submit() for _ in range(num_ahead)]
    first, second = _embed(fleet, 100), _embed(fleet, 100)
    task = prefill.take(EmbedTask)
    assert task.spec.request_id == first.request.request_id and second.request.status is RequestStatus.QUEUED
    fleet.wait(30.5, prefill, num_running=1, waiting_tokens=100)
    assert second.request.status is RequestStatus.QUEUED, "there is a worker for it, which is busy"
    assert all(one.request.error_code == "no_decode_capacity" for one in answers)
    _answer(fleet, prefill, task)
    assert prefill.take(EmbedTask).spec.request_id == second.request.request_id and not fleet.dispatcher.breaches()


async def test_an_embedding_that_no_worker_computes_fails_after_a_while() -> None:
    fleet = Fleet(config(local_prefill=False))
    decode = fleet.join("d-0")
    stream = _embed(fleet)
    fleet.wait(30.5, decode)
    assert stream.request.error_code == "no_prefill_capacity"


def test_an_embedding_has_no_worker_from_when_the_last_one_of_both_pools_is_gone() -> None:
    fleet = Fleet()
    decode = fleet.join("d-0", max_num_seqs=1)
    fleet.submit()
    waiting = _embed(fleet)  # no prefill worker is there, and no room beside the answer
    fleet.wait(20, decode, num_running=1)
    fleet.dispatcher.worker_left(decode, "killed")
    fleet.wait(29)
    assert not fleet.observer.finished
    fleet.wait(1.5)
    assert waiting.request.error_code == "no_prefill_capacity"


def test_a_request_that_may_kill_workers_is_embedded_alone() -> None:
    fleet = Fleet(config(local_prefill=False))
    links = [fleet.join(name) for name in ("p-0", "p-1", "p-2", "d-0")]
    stream = _embed(fleet)
    for _ in range(2):
        link = next(link for link in links if any(isinstance(message, EmbedTask) for message in link.sent))
        fleet.wait(0.1, *links, num_running=1)
        links.remove(link)
        fleet.dispatcher.worker_left(link, "connection lost")
        fleet.wait(1.0, *links)
    [last] = [link for link in links if any(isinstance(message, EmbedTask) for message in link.sent)]
    assert last.worker_id.startswith("p")
    task = next(message for message in last.sent if isinstance(message, EmbedTask))
    _answer(fleet, last, task)
    assert stream.request.embedding == VECTOR and fleet.dispatcher.breaches() == []
