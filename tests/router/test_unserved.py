"""A request names the served model. Where a worker does not serve what it asks for, it ends with the worker's words."""

from __future__ import annotations

import pytest

from kvferry.common.served import UNSERVED
from kvferry.router.state.errors import StreamError
from kvferry.wire.results import NoCapacity, TaskRefused
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV

from .fleet import Fleet, config, received, tokens


def test_every_attempt_names_the_model() -> None:
    fleet = Fleet()
    prefill, decode = fleet.join("p-0"), fleet.join("d-0")
    fleet.submit(model="served")
    assert fleet.grant(decode).spec.model == "served"
    assert prefill.take(PrefillTask).spec.model == "served"


@pytest.mark.parametrize("reason", UNSERVED)
@pytest.mark.parametrize("is_task", [False, True])
async def test_what_is_not_served_ends_at_once_with_the_workers_words(reason: str, is_task: bool) -> None:
    fleet = Fleet()
    prefill, decode = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit(model="a")
    words = "'a' is asked for, this worker serves 'b'"
    if is_task:
        about = {"request_id": fleet.grant(decode).spec.request_id, "attempt": 0}
        fleet.dispatcher.on_message(prefill, TaskRefused(**about, reason=reason, detail=words))  # type: ignore[arg-type]
    else:
        about = {"request_id": decode.take(ReserveKV).spec.request_id, "attempt": 0}
        fleet.dispatcher.on_message(decode, NoCapacity(**about, reason=reason, detail=words))  # type: ignore[arg-type]
    name = "p-0" if is_task else "d-0"
    with pytest.raises(StreamError, match=f"worker {name} does not serve this request: {words}") as info:
        await anext(stream)
    assert (info.value.code, info.value.status) == ("not_served", 500)
    assert decode.take(Abort).attempt == 0
    assert not fleet.dispatcher.view().num_in_flight


@pytest.mark.parametrize("reason", ["adapter", "grammar"])
@pytest.mark.parametrize("is_local", [False, True])
async def test_what_the_decode_worker_cannot_have_ends_an_answer_that_has_begun(reason: str, is_local: bool) -> None:
    """Its grammar is compiled, and its adapter loaded, beside the prompt; one whose answer waits may be loaded anew."""
    fleet = Fleet(config(local_prefill=is_local, expect_prefill=not is_local))
    task: PrefillTask | LocalTask
    if is_local:
        decode = fleet.join("d-0")
        stream = fleet.submit()
        task = decode.take(LocalTask)
        fleet.step(decode, task, tokens(0, 0, 1))
    else:
        prefill, decode = fleet.join("p-0"), fleet.join("d-0")
        stream, task = fleet.decode(prefill, decode)
    busy = fleet.submit()  # its worker is never idle: silence would say nothing
    about = {"request_id": task.spec.request_id, "attempt": 0}
    refused = TaskRefused(**about, reason=reason, detail="it cannot be had")  # type: ignore[arg-type]
    fleet.dispatcher.on_message(decode, refused)
    assert not fleet.observer.dropped
    assert [len(update.tokens) for update in received(stream)] == [1]
    with pytest.raises(StreamError, match="worker d-0 does not serve this request: it cannot be had") as info:
        await anext(stream)
    assert info.value.code == "not_served" and not busy.request.is_finished
