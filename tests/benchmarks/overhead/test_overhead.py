"""The overhead benchmark: its stubs' steps, what its client reads out of bytes, and its figures."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.benchmarks.overhead import overhead
from kvferry.benchmarks.overhead.client import Exchange, Requests, arrivals
from kvferry.benchmarks.overhead.overhead import Load, Measured, figures
from kvferry.benchmarks.overhead.report import OverheadReport, Phase, plot_overhead, write_overhead
from kvferry.benchmarks.overhead.steps import Records, Steps, StubStream
from kvferry.benchmarks.overhead.systems import Target
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.common.errors import ConfigError
from kvferry.tools.load import plot
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.stats import describe


def event(text: str) -> bytes:
    body = b"data: " + json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TAIL = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def exchange() -> Exchange:
    body = event("c").partition(b"\r\n")[2][:-2]
    parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:20], body[20:])]  # chunks cut where they like
    received = [(2.0, HEAD), (3.0, event("a") + event("b")), (4.0, parts[0]), (5.0, parts[1] + TAIL)]
    return Exchange(1.0, received)


async def test_streams_advance_together_and_leave_when_they_are_over(tmp_path: Path) -> None:
    records, steps_of = Records(), list[list[str]]()

    def emit(streams: list[StubStream]) -> None:
        steps_of.append([stream.name for stream in streams])
        for stream in streams:
            stream.emitted_s.append(float(len(steps_of)))

    steps = Steps(0.0, emit)
    for name, num_tokens in (("a", 1), ("b", 3)):
        steps.add(records.open(name, num_tokens))
    running = asyncio.ensure_future(steps.run())
    for _ in range(10):
        await asyncio.sleep(0)
    running.cancel()
    assert len(steps) == 0
    assert steps_of == [["a", "b"], ["b"], ["b"]]
    records.write(tmp_path / "records.json")
    assert json.loads((tmp_path / "records.json").read_text()) == {"a": [0.0, [1.0]], "b": [0.0, [1.0, 2.0, 3.0]]}


def test_every_letter_is_a_token_that_came_with_the_bytes_that_completed_its_event() -> None:
    found = arrivals(exchange())
    assert (found.name, found.token_s, found.num_events) == ("cmpl-1", [3.0, 3.0, 5.0], 3)


def test_an_answer_that_is_no_stream_is_an_error() -> None:
    with pytest.raises(ConfigError, match="503"):
        arrivals(Exchange(0.0, [(1.0, b"HTTP/1.1 503 Service Unavailable\r\n\r\n")]))


def test_prompts_differ_from_their_beginning_on() -> None:
    requests = Requests("m", 12, 32, {"authorization": "Bearer k"})
    bodies = [json.loads(requests.next().partition(b"\r\n\r\n")[2]) for _ in range(2)]
    assert [body["prompt"].split()[0] for body in bodies] == ["1", "2"]
    assert all(len(body["prompt"].split()) == 13 and body["max_tokens"] == 32 for body in bodies)


def test_figures_count_what_left_and_came_in_the_measured_time() -> None:
    target = Target(1, 1, {}, lambda name: name, {"cmpl-1": (0.5, [2.5, 2.9, 4.5])})
    phase = figures("kvferry", Load("x", 1, 3), target, Measured([exchange()], 2.6, 9.0, 0.004))
    assert (phase.num_requests, phase.num_tokens, phase.tokens_per_event) == (1, 2, 1.0)
    assert phase.added_first_ms.p50 == 1500.0  # two seconds, half of one the stub's
    assert phase.added_token_ms.max == pytest.approx(500.0)
    assert (phase.cpu_us_per_request, phase.cpu_us_per_token) == (4000.0, 2000.0)


def phase(load: str, num_requests: int, num_tokens: int, cpu_s: float, ms: float) -> Phase:
    return Phase("kvferry", load, num_requests, num_tokens, 1.0, 1.0, cpu_s, describe([ms]), describe([ms]))


def test_the_cost_of_a_token_is_what_longer_answers_cost_more(tmp_path: Path) -> None:
    phases = (
        phase("one stream", 10, 320, 0.1, 1.0),
        phase("64 lanes, 32 tokens", 1000, 32_000, 0.5, 1.0),
        phase("64 lanes, 256 tokens", 100, 25_600, 0.274, 1.0),
        phase("500 streams", 500, 10_000, 0.1, 1.0),
    )
    report = OverheadReport(phases, 4, 80, describe_environment("test", []))
    assert [bar.value for bar in report.bars()] == pytest.approx([500.0, 10.0, 10.0, 1.0, 1.0])
    assert exit_code(report.bars()) == 0
    write_overhead(report, tmp_path / "overhead.json")
    assert len(json.loads((tmp_path / "overhead.json").read_text())["bars"]) == 5
    slow = replace(phases[3], cpu_s=0.2)
    assert exit_code(replace(report, phases=(*phases[:3], slow)).bars()) == 1
    silent = replace(phases[3], added_token_ms=describe(()))  # nothing was measured of it: no bar is kept by that
    [missed] = [bar for bar in replace(report, phases=(*phases[:3], silent)).bars() if not bar.is_met]
    assert (missed.what, missed.value) == ("kvferry: added to a token of 500 streams, p99", None)


def test_a_peer_stands_beside_ours_and_is_held_to_nothing(tmp_path: Path) -> None:
    loads = ("one stream", "64 lanes, 32 tokens", "64 lanes, 256 tokens", "500 streams")
    ours = tuple(phase(load, 10, 320 * (1 + 7 * ("256" in load)), 0.001, 1.0) for load in loads)
    theirs = tuple(replace(one, system="sglang-router", cpu_s=100.0) for one in ours)
    report = OverheadReport((*ours, *theirs), 4, 80, describe_environment("test", []))
    assert len(report.bars()) == 10 and exit_code(report.bars()) == 0
    plot_overhead(report, tmp_path / "overhead.svg")
    assert (tmp_path / "overhead.svg").exists()


def test_nothing_is_measured_that_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "MATPLOTLIB", SimpleNamespace(is_installed=False, missing="no matplotlib here"))
    monkeypatch.setattr(overhead, "measure", lambda *args: pytest.fail("measured"))
    assert overhead.main(["--systems", "kvferry"]) == 2
    assert "no matplotlib here" in capsys.readouterr().err
