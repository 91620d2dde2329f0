"""A chaos run's parts: its requests, what its client tells, what it does to workers, and the tally."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from kvferry.common.errors import ConfigError
from kvferry.tools.chaos import command as chaos
from kvferry.tools.chaos.client import send
from kvferry.tools.chaos.events import ChoiceAnswer, Cut, Delta, Done, Event, Failed, Left, Note, Request, Sent, Usage
from kvferry.tools.chaos.history import Counted, Verdict, judge
from kvferry.tools.chaos.load import Load, Result, collect
from kvferry.tools.chaos.options import parse_options
from kvferry.tools.chaos.requests import ASK_KINDS, Ask, plan_asks
from kvferry.tools.chaos.serve_system import System, parse_metrics
from kvferry.tools.chaos.system import Books, LogTail, balance, settle
from kvferry.tools.chaos.tally import Tally, find_gaps, print_tally, tally
from kvferry.tools.chaos.workers import KINDS, Strike, Workers
from kvferry.tools.load.http_client import HttpClient
from kvferry.tools.load.report import report_console

from ...benchmarks.scripted_server import DONE, Received, Script, event, scripted_server, usage

ASK = Ask(7, "greedy", "/v1/completions", {"prompt": [1]}, 1, 4, True)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_requests_again_and_another_one_others() -> None:
    first, again, other = (plan_asks(44, seed, models=["m"], vocab_size=400) for seed in (1, 1, 2))
    assert first == again != other
    assert len({str(ask.body) for ask in first}) == 44


def test_every_way_to_ask_is_among_them() -> None:
    asks = plan_asks(110, 0, models=["m"], vocab_size=400)
    bodies = [ask.body for ask in asks]
    fields = ("logprobs", "top_logprobs", "n", "presence_penalty", "repetition_penalty", "messages", "prompt", "input")
    for field in fields:
        assert any(field in body for body in bodies), field
    assert {ask.path for ask in asks if ask.tells_tokens} == {"/v1/completions", "/v1/chat/completions"}
    assert {ask.path for ask in asks if not ask.tells_tokens} == {"/v1/responses", "/v1/messages"}
    assert {body["stream"] for body in bodies} == {True, False}
    assert all(ask.body["return_token_ids"] for ask in asks if ask.tells_tokens)
    assert all("seed" in body or body["temperature"] == 0 for body in bodies)


def test_some_ways_to_ask_may_be_named() -> None:
    asks = plan_asks(4, 0, models=["m"], vocab_size=400, kinds=("guided", "chat tools"))
    assert [ask.kind for ask in asks] == ["guided", "chat tools"] * 2
    for named in ("guided,sung", ""):
        with pytest.raises(ConfigError, match=rf"--requests {named}: these are known: greedy, .*chat tools"):
            parse_options(["--requests", named])


def test_a_run_that_would_never_ask_what_is_named_is_refused() -> None:
    """As it would be called good of that."""
    kinds, both = ["--requests", "greedy,chat"], ["--adapters", "red,blue"]
    assert parse_options([*kinds, "--num-requests", "2"]).num_asks == 2
    assert parse_options([*kinds, *both, "--num-requests", "6"]).num_asks == 6
    with pytest.raises(ConfigError, match="--num-requests 1: some would never be asked; 2 is one of each kind, or"):
        parse_options([*kinds, "--num-requests", "1"])
    with pytest.raises(ConfigError, match=r"--num-requests 5: .*; 6 is one of each kind for each model, or name fewer"):
        parse_options([*kinds, *both, "--num-requests", "5"])
    with pytest.raises(ConfigError, match=f"{3 * len(ASK_KINDS)} is one of each kind for each model"):
        parse_options([*both, "--num-requests", "12"])


def test_a_stop_string_is_taken_from_the_middle_of_the_answer() -> None:
    body = replace(ASK, wants_stop=True).with_stop(ChoiceAnswer(text="abcdefgh")).body
    assert body["stop"] == ["def", "no such text"]
    assert "stop" not in ASK.with_stop(ChoiceAnswer(text="")).body


def test_what_is_added_when_it_is_sent_does_not_touch_the_answer() -> None:
    source = random.Random(0)
    bodies = [ASK.send_body(source) for _ in range(50)]
    assert all(body.keys() <= {*ASK.body, "priority", "cache_salt"} for body in bodies)
    assert {"cache_salt" in body for body in bodies} == {True, False}


# --- client -----------------------------------------------------------------------------------------------------------


def _chunk(text: str, ids: list[int], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "text": text, "token_ids": ids, "finish_reason": finish, "logprobs": None}
    return event(id="cmpl-abc", object="text_completion", choices=[choice])


async def _ask(script: Script, ask: Ask = ASK) -> Request:
    events: list[Event] = []
    async with scripted_server(lambda _: script) as server:
        client = HttpClient(server.base_url)
        await send(client, 3, ask, ask.body, events.append, began_s=0.0)
        client.close()
    return collect(events)  # type: ignore[arg-type]  # no notes come from a client


async def test_a_stream_is_told_chunk_by_chunk() -> None:
    pieces = [_chunk("ab", [1, 2]), _chunk("", [], "length"), usage(3, 2), DONE]
    request = await _ask(Script(pieces))
    assert [type(told) for told in request.events] == [Delta, Delta, Usage, Done]
    assert request.answer() == [ChoiceAnswer("ab", [1, 2], [], "length")]
    assert request.answer_id == "abc"


async def test_calls_of_tools_are_told_beside_the_text_and_without_their_ids() -> None:
    def chunk(ids: list[int], finish: str | None = None, **delta: object) -> bytes:
        return event(
            id="chatcmpl-abc", choices=[{"index": 0, "delta": delta, "token_ids": ids, "finish_reason": finish}]
        )

    def call(index: int, **function: str) -> dict[str, object]:
        return {"index": index, "id": "call_another_each_time", "function": function}

    pieces = [
        chunk([1], content="so: "),
        chunk([2], tool_calls=[call(0, name="find", arguments="{")]),
        chunk([3], tool_calls=[call(0, arguments="}"), call(1, name="move", arguments="{}")]),
        chunk([4], content="and"),
        chunk([], "tool_calls"),
    ]
    request = await _ask(Script([*pieces, usage(3, 4), DONE]))
    calls = "\n0 find {}\n1 move {}"
    assert request.answer() == [ChoiceAnswer("so: and", [1, 2, 3, 4], [], "tool_calls", calls=calls)]
    assert judge(request, request).breaches == []
    last = chunk([3, 4], tool_calls=[call(0, arguments="}"), call(1, name="move", arguments="{}")], content="and")
    in_one = await _ask(Script([*pieces[:2], last, *pieces[4:], usage(3, 4), DONE]))
    assert judge(in_one, request).breaches == [], "what one chunk adds to both has no order"


async def test_log_probabilities_come_token_by_token() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": None, "text_offset": [0, 1]}
    choice = {"index": 0, "text": "ab", "token_ids": [1, 2], "logprobs": logprobs}
    request = await _ask(Script([event(id="cmpl-abc", choices=[choice]), usage(3, 2), DONE]))
    assert request.answer()[0].logprobs == [["a", -1.0, None], ["b", -2.0, None]]


async def test_an_answer_that_is_no_stream_is_one_chunk() -> None:
    choice = {"index": 0, "text": "ab", "token_ids": [1, 2], "finish_reason": "stop"}
    body = {"id": "cmpl-abc", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    script = Script([json.dumps(body).encode()], content_type="application/json")
    request = await _ask(script, replace(ASK, is_stream=False))
    assert [type(told) for told in request.events] == [Delta, Usage, Done]


async def test_an_error_in_the_middle_of_a_stream_is_told_with_its_code() -> None:
    error = {"message": "lost", "type": "server_error", "code": "worker_lost", "param": None}
    request = await _ask(Script([_chunk("ab", [1, 2]), event(error=error)]))
    failure = request.failure
    assert failure is not None and (failure.status, failure.code, failure.answer_id) == (200, "worker_lost", "abc")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (Script([_chunk("ab", [1, 2])]), Cut),
        (Script([_chunk("ab", [1, 2])], is_cut=True), Cut),
        (Script([b"<html>502</html>"], status=502, content_type="text/html"), Failed),
        (Script([b"data: no json\n\n"]), Failed),
    ],
    ids=["no [DONE]", "cut off", "no proper error", "unreadable"],
)
async def test_an_end_that_a_client_cannot_make_sense_of_is_told_as_one(script: Script, kind: type) -> None:
    request = await _ask(script)
    last = request.events[-1]
    assert isinstance(last, kind) and not getattr(last, "code", "")


async def test_an_answer_that_differs_from_its_reference_is_counted() -> None:
    def script(received: Received) -> Script:
        is_reference = "priority" not in received.body
        ids = [1, 2] if is_reference else [1, 3]
        return Script([_chunk("ab", ids, "length"), usage(1, 2), DONE])

    async with scripted_server(script) as server:
        over = asyncio.Event()
        load = Load(server.base_url, 0.0, lambda told: over.set() if isinstance(told, Done) else None)
        asks = await load.compute_references([ASK], 1)
        await load.run(asks, 1, 0, over)
        assert load.results == []  # it was over before it began
        over.clear()
        await load.run(asks, 1, 0, over)
        load.close()
    assert load.results[0].verdict.num_changed == 1 and load.results[0].failure == ""


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_client_that_has_had_enough_leaves_and_does_not_come_back(key: str | None) -> None:
    events: list[Event] = []
    async with scripted_server(lambda _: Script([_chunk("ab", [1, 2])], is_stuck=True)) as server:
        client = HttpClient(server.base_url)
        await send(client, 3, ASK, ASK.body, events.append, began_s=0.0, key=key, leave_after_s=0.2)
        client.close()
        assert len(server.requests) == 1
    request = collect(events)  # type: ignore[arg-type]
    assert isinstance(request.events[-1], Left) and judge(request).breaches == []


async def test_a_share_of_clients_leaves() -> None:
    over = asyncio.Event()
    async with scripted_server(lambda _: Script([_chunk("ab", [1, 2])], is_stuck=True)) as server:
        load = Load(server.base_url, 0.0, lambda told: over.set() if isinstance(told, Left) else None, leaving=1.0)
        await load.run([ASK], 2, 0, over)
        load.close()
    assert load.results and all(result.has_left for result in load.results)
    assert not any(result.verdict.is_lost or result.failure for result in load.results)


async def test_a_wrong_answer_before_anything_was_disturbed_ends_the_run() -> None:
    async with scripted_server(lambda _: Script([_chunk("ab", [1, 2], "length"), usage(1, 3), DONE])) as server:
        load = Load(server.base_url, 0.0, lambda event: None)
        with pytest.raises(ConfigError, match="I9"):
            await load.compute_references([ASK], 1)
        load.close()


# --- workers and log --------------------------------------------------------------------------------------------------


def _joined(process: subprocess.Popen[bytes], at_s: float) -> Note:
    return Note(at_s=at_s, what="worker_joined", worker_id="d-0", detail={"pid": process.pid, "role": "decode"})


_WORDS = ("--config-json", '{"worker_id":"d-0"}')  # by which a process is known
_SLEEP = "import signal; print('there', flush=True); signal.pause()"


@contextmanager
def _sleeper(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _SLEEP, *(words or _WORDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _leader() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends as soon as its other rank does."""
    rank = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], 'kvferry.engine.follower_process'])"
    )
    with subprocess.Popen([sys.executable, "-c", rank, _SLEEP, *_WORDS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        children = psutil.Process(process.pid).children()
        try:
            yield process
        finally:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _strike(workers: Workers, kind: str) -> Strike:
    """The first seed that brings this kind."""
    for seed in range(100):
        source = random.Random(seed)
        source.choice(workers.up)
        if source.choice(KINDS) == kind:
            strike = workers.strike(random.Random(seed))
            assert strike is not None and strike.kind == kind
            return strike
    raise AssertionError(kind)


async def test_a_killed_worker_is_followed_from_the_blow_to_its_successor() -> None:
    told: list[str] = []
    is_dead = asyncio.Event()

    def tell(event: Event) -> None:
        assert isinstance(event, Note)
        told.append(event.what)
        if event.what == "death":
            is_dead.set()

    workers = Workers(0.0, tell)
    with _sleeper() as first, _sleeper() as second:
        workers.on_note(_joined(first, 0.0))
        strike = _strike(workers, "kill")
        await is_dead.wait()
        assert strike.died_s is not None
        workers.on_note(Note(at_s=strike.at_s + 0.1, what="worker_lost", worker_id="d-0"))
        workers.on_note(_joined(second, strike.died_s + 2.0))
        assert strike.notice_s == pytest.approx(0.1) and strike.absence_s == pytest.approx(2.0)
        assert [life.pid for life in workers.up] == [second.pid] and workers.num_joined == 2
        workers.close()
    assert told == ["kill", "death"]


async def test_another_rank_of_a_worker_is_struck_where_there_is_one() -> None:
    workers = Workers(0.0, lambda event: None, ["rank"])
    with _sleeper() as alone, _leader() as leader:
        workers.on_note(_joined(alone, 0.0))
        assert workers.strike(random.Random(0)) is None and workers.up, "it has no other rank"
        with pytest.raises(ConfigError, match=r"--blows rank: .* --serve-flags '--tensor-parallel-size 2'"):
            workers.check()
        workers.on_note(_joined(leader, 1.0))
        workers.check()
        strike = workers.strike(random.Random(0))
        assert strike is not None and (strike.kind, strike.pid) == ("rank", leader.pid)
        assert leader.wait(20) == 0, "its child was killed"
        workers.close()


def test_a_stopped_worker_is_struck_no_more_and_goes_on_when_the_run_is_over() -> None:
    workers = Workers(0.0, lambda event: None)

    async def run(process: subprocess.Popen[bytes]) -> None:
        workers.on_note(_joined(process, 0.0))
        strike = _strike(workers, "hang")
        assert workers.up == [] and workers.strike(random.Random(0)) is None and strike.died_s is None

    with _sleeper() as process:
        asyncio.run(run(process))
        workers.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM  # a stopped one would not end


async def test_everything_is_restarted_once_at_a_time() -> None:
    workers = Workers(0.0, lambda event: None, ["restart"], restart=["sleep", "1000"])
    with _sleeper() as process:
        workers.on_note(_joined(process, 0.0))
        strike = workers.strike(random.Random(0))
        assert strike is not None and (strike.kind, strike.worker_id) == ("restart", "everything")
        await workers.until_restarted(0.1)
        assert workers.strike(random.Random(0)) is None and workers.strikes == [], "it is under way"
        workers.close()
        assert not psutil.pid_exists(strike.pid) and process.poll() is None


async def test_a_restart_counts_if_it_ended_well(tmp_path: Path) -> None:
    log = tmp_path / "restarts.log"
    script = f"echo no deployment >&2; test -e {tmp_path / 'works'}"
    workers = Workers(0.0, lambda event: None, ["restart"], restart=["sh", "-c", script], restart_log=log)
    with _sleeper() as process:
        workers.on_note(_joined(process, 0.0))
        assert workers.strike(random.Random(0)) is not None
        await workers.until_restarted(60.0)
        assert workers.strikes == [] and log.read_text() == "no deployment\n"
        (tmp_path / "works").touch()
        strike = workers.strike(random.Random(0))
        await workers.until_restarted(60.0)
        assert workers.strikes == [strike]
        workers.close()


async def test_the_end_of_a_restart_is_told_when_it_ends() -> None:
    """Nobody need ask."""
    told: list[Note] = []
    ended = asyncio.Event()

    def tell(event: Event) -> None:
        assert isinstance(event, Note)
        told.append(event)
        if event.what == "restarted":
            ended.set()

    workers = Workers(0.0, tell, ["restart"], restart=["sh", "-c", "exit 3"])
    with _sleeper() as process:
        workers.on_note(_joined(process, 0.0))
        strike = workers.strike(random.Random(0))
        assert strike is not None
        await asyncio.wait_for(ended.wait(), 60.0)
        await workers.until_restarted(0.0)
        workers.close()
    assert [(note.what, note.detail) for note in told] == [
        ("restart", {"pid": strike.pid}),
        ("restarted", {"pid": strike.pid, "code": 3}),
    ]
    assert told[0].at_s <= told[1].at_s


async def test_a_process_that_is_not_the_worker_is_not_struck() -> None:
    """It has the number that the worker has on another machine."""
    workers = Workers(0.0, lambda event: None)
    with _sleeper("--config-json", '{"worker_id":"d-1"}') as other, _sleeper("something", "else") as stranger:
        for process in (other, stranger):
            with pytest.raises(ConfigError, match=f"d-0: process {process.pid} of this machine is another"):
                workers.on_note(_joined(process, 0.0))
        assert workers.up == [] and workers.strike(random.Random(0)) is None
        workers.close()


def test_a_worker_that_has_died_since_it_joined_is_none_to_strike() -> None:
    workers = Workers(0.0, lambda event: None)
    with subprocess.Popen([sys.executable, "-c", "", *_WORDS]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended
        workers.on_note(_joined(process, 0.0))
    workers.on_note(_joined(process, 0.0))
    assert workers.up == [] and workers.num_joined == 0


async def test_whichever_of_two_fails_ends_the_other() -> None:
    async def fail() -> None:
        raise ConfigError("of the log")

    with pytest.raises(ConfigError, match="of the log"):
        async with chaos._beside(fail()):
            await asyncio.Event().wait()
    with pytest.raises(ConfigError, match="of the block"):
        async with chaos._beside(asyncio.Event().wait()):
            raise ConfigError("of the block")
    async with chaos._beside(asyncio.Event().wait()):
        pass


def test_workers_are_let_go_in_whatever_way_a_run_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As by a second Ctrl-C, which comes while the event loop cleans up: a worker that stays stopped ends nothing."""
    closed: list[Workers] = []

    async def interrupted(*_: object) -> Tally:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "close", lambda workers: closed.append(workers))
    monkeypatch.setattr(chaos._Chaos, "_disturb", interrupted)
    monkeypatch.setattr(chaos, "serving", lambda *_: contextlib.nullcontext(SimpleNamespace(
        base_url="http://127.0.0.1:1", program_pids=lambda name: [],
    )))  # fmt: skip
    options = parse_options(["--log-dir", str(tmp_path)])
    run = chaos._Chaos(options, tmp_path, lambda event: None, report_console())
    with pytest.raises(KeyboardInterrupt):
        run.disturb([])
    assert len(closed) == 1


async def test_a_new_session_of_the_same_process_is_no_restart() -> None:
    workers = Workers(0.0, lambda event: None)
    with _sleeper() as process:
        workers.on_note(_joined(process, 0.0))
        workers.on_note(_joined(process, 4.0))
        assert workers.num_joined == 1
        workers.close()


def test_a_growing_log_is_read_line_by_line(tmp_path: Path) -> None:
    log, notes = tmp_path / "log", list[Note]()
    tail = LogTail(log, 1_700_000_000.0, notes.append)
    line = (
        '{"worker_id": "d-0", "pid": 5, "role": "decode", "event": "worker_joined", "timestamp": '
        '"2023-11-14T22:13:21.5+00:00"}\n'
    )
    log.write_text("d-0: ready\n" + line[:40])
    tail.read()
    assert notes == []
    log.write_text("d-0: ready\n" + line + '{"event": "other", "timestamp": "2023-11-14T22:13:20+00:00"}\n')
    tail.read()
    tail.read()
    [note] = notes
    assert (note.what, note.worker_id, note.at_s, note.detail["pid"]) == ("worker_joined", "d-0", 1.5, 5)


def test_blocks_are_counted_by_what_holds_them() -> None:
    states = {"free": 10, "cached": 3, "active": 2, "granted": 1, "quarantined": 4}
    lines = [f'kvferry_blocks{{pool="decode",state="{name}",worker="d-0"}} {count}.0' for name, count in states.items()]
    books = balance(parse_metrics("\n".join([*lines, "kvferry_queued_requests 2.0"])))
    assert books == Books(num_workers=1, num_blocks=20, num_held=3, num_quarantined=4, num_requests=2)
    assert not books.is_quiet


async def test_what_any_router_still_holds_is_in_the_books() -> None:
    """Each has a queue of its own, which no other tells of; the workers are the same."""

    def metrics(*lines: str) -> Script:
        block = 'kvferry_blocks{pool="decode",state="%s",worker="d-0"} %s'
        return Script(["\n".join([block % ("free", 1), *lines, ""]).encode()])

    busy = 'kvferry_num_requests_running{pool="decode",worker="d-0"} 1'
    asked: list[str] = []

    def router(*lines: str) -> Callable[[Received], Script]:
        def answer(received: Received) -> Script:
            asked.append(received.path)
            return metrics(*lines)

        return answer

    async with (
        scripted_server(router("kvferry_queued_requests 0", busy)) as first,
        scripted_server(router("kvferry_queued_requests 2", busy)) as second,
    ):
        system = System(first.base_url, "m", SimpleNamespace())  # type: ignore[arg-type]  # no process is looked at
        alone, _ = await settle(system, 1, 0.0)
        both, _ = await settle(system, 1, 0.0, [first.base_url, second.base_url])
    assert (alone.num_requests, both.num_requests) == (1, 3)
    assert asked == ["/metrics", "/admin/metrics", "/admin/metrics"]


# --- tally ------------------------------------------------------------------------------------------------------------

QUIET = Books(num_workers=4, num_blocks=100, num_held=0, num_quarantined=0, num_requests=0)


def _result(number: int, times_s: list[float], verdict: Verdict | None = None, failure: str = "") -> Result:
    answered = None if failure else Counted(number, f"id{number}", 3)
    return Result(
        number, 7, "greedy", 0.0, 20.0, f"id{number}", verdict or Verdict(num_tokens=3), answered, failure,
        array("d", times_s),
    )  # fmt: skip


def _row(number: int) -> Note:
    return Note(at_s=20.0, what="request_finished", answer_id=f"id{number}", detail={"completion_tokens": 3})


def _failed(number: int, at_s: float) -> Note:
    reason = "decode worker d-0 lost: connection ended"
    return Note(at_s=at_s, what="attempt_failed", answer_id=f"id{number}", detail={"stage": "decode", "reason": reason})


def _reference() -> Request:
    events: list[Event] = [Sent(request=1, ask=7, kind="greedy", at_s=0.0, num_choices=1, max_tokens=3)]
    events += [Delta(request=1, at_s=at_s, choice=0, text="x", token_ids=[1]) for at_s in (0.1, 0.2, 0.3)]
    return collect(events)  # type: ignore[arg-type]  # no notes among them


def _tally(
    results: list[Result], books: Books = QUIET, notes: list[Note] | None = None, *, num_strikes: int = 1
) -> Tally:
    rows = [_row(result.number) for result in results]
    strikes = [Strike("kill", "d-0", "decode", 1, at_s=10.0)] * num_strikes
    return tally(
        results, {7: _reference()}, notes if notes is not None else rows, strikes, books,
        settled_s=0.5, num_routers=1, num_workers=4, num_joined=4,
    )  # fmt: skip


def test_a_pause_is_measured_from_the_blow_to_the_first_chunk_after_the_stream_was_placed_anew() -> None:
    strike = Strike("kill", "d-0", "decode", 1, at_s=10.0)
    results = [_result(1, [9.9, 10.01, 10.6]), _result(2, [9.0, 9.5, 10.7])]
    [gap] = find_gaps(results, {7: _reference()}, [_failed(1, 10.2)], [strike])
    assert gap.gap_s == pytest.approx(0.6)  # the chunk at 10.01 was on its way
    assert gap.recompute_s == pytest.approx(0.1)


def test_a_stream_that_had_not_begun_or_ended_there_has_no_pause() -> None:
    strike = Strike("kill", "d-0", "decode", 1, at_s=10.0)
    results = [_result(1, [10.6]), _result(2, [9.0, 10.1])]
    assert list(find_gaps(results, {}, [_failed(1, 10.2), _failed(2, 10.2)], [strike])) == []


def test_a_run_in_which_nothing_broke_is_good() -> None:
    found = _tally([_result(1, [1.0]), _result(2, [1.0])])
    assert found.is_good and not any(found.broken.values())
    assert found.as_json()["is_good"] is True
    print_tally(found, "a run", report_console())


def test_a_run_that_shows_nothing_is_not_good() -> None:
    assert not _tally([]).is_good
    unlike = replace(_result(1, [1.0]), ask=8)
    assert _tally([unlike]).lack == "no answer could be compared with an undisturbed one"
    untouched = _tally([_result(1, [1.0])], num_strikes=0)
    assert not untouched.is_good and untouched.lack == "nothing was struck" == untouched.as_json()["lack"]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (lambda: _tally([_result(1, [1.0])]), 0),
        (lambda: _tally([_result(1, [1.0])], num_strikes=0), 2),
        (lambda: _tally([_result(1, [1.0], Verdict(is_lost=True))], num_strikes=0), 1),
    ],
    ids=["good", "nothing was struck", "lost"],
)
def test_the_exit_code_says_what_a_run_has_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Callable[[], Tally], code: int
) -> None:
    monkeypatch.setattr(chaos, "run", lambda *_: found())
    assert chaos.main(["--log-dir", str(tmp_path)]) == code


def test_figures_that_cannot_be_written_are_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chaos, "run", lambda *_: _tally([_result(1, [1.0])]))
    assert chaos.main(["--log-dir", str(tmp_path), "--json", "/dev/full"]) == 2
    shown = capsys.readouterr()
    assert "kvferry chaos: /dev/full cannot be written: No space left on device\n" in shown.err
    assert "answers not byte-identical" in shown.out


@pytest.mark.parametrize(
    ("verdict", "what"),
    [
        (Verdict(is_lost=True), "requests lost"),
        (Verdict(num_missing=1), "tokens missing"),
        (Verdict(num_repeated=1), "tokens repeated"),
        (Verdict(num_changed=1), "tokens changed"),
    ],
)
def test_whatever_a_client_saw_of_it_makes_a_run_bad(verdict: Verdict, what: str) -> None:
    found = _tally([_result(1, [1.0], verdict), _result(2, [1.0])])
    assert found.broken[what] == 1 and not found.is_good


@pytest.mark.parametrize(
    ("books", "what"),
    [
        (replace(QUIET, num_held=2), "blocks leaked"),
        (replace(QUIET, num_quarantined=2), "blocks left in quarantine"),
        (replace(QUIET, num_requests=2), "requests left over"),
        (replace(QUIET, num_workers=2), "workers not back"),
    ],
)
def test_whatever_is_left_over_makes_a_run_bad(books: Books, what: str) -> None:
    found = _tally([_result(1, [1.0])], books)
    assert found.broken[what] == 2 and not found.is_good


def test_an_answer_without_a_row_in_the_routers_log_makes_a_run_bad() -> None:
    found = _tally([_result(1, [1.0])], notes=[])
    assert found.broken["histories with a breach"] == 1


# --- command line -----------------------------------------------------------------------------------------------------


def test_flags_of_the_system_are_handed_through(tmp_path: Path) -> None:
    options = parse_options(["--decode", "3", "--serve-flags", "--dtype bfloat16", "--log-dir", str(tmp_path)])
    assert options.num_workers == 5
    assert options.flags[:7] == ["--policy", "least_loaded", "--prefill", "2", "--decode", "3", "--deterministic"]
    assert options.flags[-4:] == ["--admin-port", "0", "--dtype", "bfloat16"]
    assert options.title(1).startswith("1 router, 2 prefill, 3 decode workers; ")
    assert options.title(2).startswith("2 routers, 2 prefill")


def test_an_undisturbed_deployment_may_have_other_flags() -> None:
    same = parse_options(["--serve-flags", "--block-size 8"])
    assert same.undisturbed_flags == same.flags
    other = parse_options(["--serve-flags", "--block-size 8", "--reference-flags", "--prefill 0"])
    assert other.undisturbed_flags == ["--deterministic", "--kv-cache-memory-bytes", "6MiB", "--prefill", "0"]
    assert other.flags == same.flags


def test_requests_are_for_adapters_as_well() -> None:
    options = parse_options(["--adapters", "red,blue", "--num-requests", "84", "--requests", "greedy,chat"])
    models = [ask.body["model"] for ask in options.asks("tiny", 400)]
    assert models == ["tiny", "tiny", "red", "red", "blue", "blue"] * 14


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--minutes", "0.03"], "--minutes 0.03: the first blow comes after 2 s"),
        (["--serve-flags", "--launcher ray"], "--serve-flags: no --launcher: what is struck are processes"),
        (["--serve-flags", "--dtype bfloat16 --launcher=ray"], "--serve-flags: no --launcher"),
    ],
)
def test_a_run_that_could_strike_nothing_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_options(words)


def test_flags_of_the_system_with_an_open_quote_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(["--serve-flags", "--dtype 'x"])
    assert ended.value.code == 2
    assert "cannot be parted into words: No closing quotation" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--minutes", "--every", "--concurrency"])
def test_a_number_that_is_not_above_zero_is_refused(flag: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options([flag, "0"])
    assert ended.value.code == 2


def test_a_folder_that_is_not_there_is_said_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chaos.main(["--json", str(tmp_path / "none" / "run.json")]) == 2
    assert "there is no directory" in capsys.readouterr().err
