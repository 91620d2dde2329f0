"""A request names the served model. Where a worker does not serve what it asks for, it ends with the worker's words."""

from __future__ import annotations

import pytest

from kvferry.common.served import UNSERVED
from kvferry.router.state.errors import StreamError
from kvferry.wire.results import NoCapacity, TaskRefused
from kvferry.wire.tasks import Abort, PrefillTask, ReserveKV

from .fleet import Fleet


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
