"""What a request asks for and a worker does not serve is refused in either role, with the reason and both values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvferry.common.grammar import Grammar
from kvferry.common.request import RequestSpec, SamplingParams
from kvferry.common.served import UNSERVED, Served
from kvferry.wire.results import FirstToken, Grant, NoCapacity, TaskRefused
from kvferry.wire.tasks import LocalTask, ReserveKV

from .bench import BothBench

SERVED = "served"
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "other"}, "model", "'other' is asked for, this worker serves 'served'"),
    ({"adapter": "0a1b"}, "adapter", "adapter 0a1b is asked for, this version applies none"),
    ({"grammar": Grammar("regex", b"a*")}, "grammar", "a grammar ('regex') is asked for, this version follows none"),
]


def _bench(role: str) -> BothBench:
    bench = BothBench("prefill" if role == "prefill" else "decode")
    bench.role._intake = replace(bench.role._intake, served=Served(SERVED))
    bench.prefill._served = Served(SERVED)
    return bench


@pytest.mark.parametrize(("fields", "reason", "words"), CASES)
def test_it_is_refused_in_every_way_in(fields: dict[str, Any], reason: str, words: str) -> None:
    decode, prefill = _bench("decode"), _bench("prefill")
    decode.send(ReserveKV(spec=decode.spec("reserved", 20, **fields)))
    decode.send(LocalTask(spec=decode.spec("local", 20, **fields)))
    prefill.send(prefill.task(prefill.spec("task", 20, **fields)))
    for answer in (*decode.sent, *prefill.sent):
        assert isinstance(answer, NoCapacity | TaskRefused)
        assert (answer.reason, answer.detail) == (reason, words)
    assert [type(answer) for answer in (*decode.sent, *prefill.sent)] == [NoCapacity, TaskRefused, TaskRefused]
    assert decode.both.is_quiet and prefill.both.is_quiet


@pytest.mark.parametrize("model", ["", SERVED])
def test_its_own_model_is_served_by_name_and_without_one(model: str) -> None:
    decode, prefill = _bench("decode"), _bench("prefill")
    decode.send(ReserveKV(spec=decode.spec("reserved", 20, model=model)))
    assert isinstance(decode.sent[-1], Grant)
    prefill.send(prefill.task(prefill.spec("task", 20, model=model)))
    while prefill.step() is not None:
        pass
    assert isinstance(prefill.last(FirstToken), FirstToken)


def test_the_reasons_are_those_that_routers_know() -> None:
    sound: dict[str, Any] = {"request_id": "r", "attempt": 0, "prompt": b"", "sampling": SamplingParams()}
    found = [Served(SERVED).why_not(RequestSpec(**sound, **fields)) for fields, _, _ in CASES]
    assert tuple(refusal[0] for refusal in found if refusal is not None) == UNSERVED
