from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.config import API_KEY_VARIABLE
from kvferry.common.errors import ConfigError
from kvferry.tools.load import client as subject
from kvferry.tools.load.client import main, plan_requests, read_rows, run_bench
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.options import parse_options
from kvferry.tools.load.stats import Slo

from ...benchmarks.scripted_server import (
    DONE,
    Received,
    Script,
    ScriptedServer,
    answer,
    chat_chunk,
    event,
    scripted_server,
    text_chunk,
    usage,
)


def serve_well(request: Received) -> Script:
    if request.path == "/v1/models":
        return Script([json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode()])
    num_tokens = request.body["max_tokens"]
    prompt = request.body.get("prompt", "")
    assert isinstance(num_tokens, int)
    assert isinstance(prompt, list | str)
    return Script(answer(num_tokens, num_prompt_tokens=len(prompt)))


async def bench(server: ScriptedServer, *argv: str) -> int:
    """The command in a thread of its own, as it brings its own event loop."""
    return await asyncio.to_thread(main, ["--base-url", server.base_url, *argv])


@pytest.mark.slow
async def test_run_sends_what_was_asked_for_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, plot_path = tmp_path / "run.json", tmp_path / "run.svg"
    flags = "--input-len 9 --output-len 3 --num-requests 6 --max-concurrency 2 --num-warmups 1 --ttft-slo-ms 60000"
    async with scripted_server(serve_well) as server:
        code = await bench(server, *flags.split(), "--json", str(json_path), "--plot", str(plot_path))
    assert code == 0
    bodies = [request.body for request in server.requests if request.path == "/v1/completions"]
    assert len(bodies) == 1 + 1 + 6  # probe, warm-up, run
    assert all(body["model"] == "tiny" for body in bodies)
    prompts = [body["prompt"] for body in bodies[1:]]
    assert len({json.dumps(prompt) for prompt in prompts}) == 7
    assert all(isinstance(prompt, list) and len(prompt) == 9 for prompt in prompts)

    saved = json.loads(json_path.read_text())
    assert saved["load"] == "closed loop, 2 in flight"
    assert (saved["summary"]["num_ok"], saved["summary"]["num_output_tokens"]) == (6, 18)
    assert saved["summary"]["num_good"] == 6
    assert saved["summary"]["counted_by"] == {"token_ids": 6}
    assert [request["num_prompt_tokens"] for request in saved["requests"]] == [9] * 6
    assert saved["environment"]["command"].startswith("kvferry bench --base-url http://127.0.0.1:")
    assert saved["environment"]["kvferry_version"]

    assert plot_path.read_text().startswith("<?xml")
    table = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "ITL", "e2e", "p99", "goodput (TTFT <= 60000 ms)", "6 / 0"):
        assert word in table


async def test_failed_requests_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    num_asked = 0

    def fail_every_other(request: Received) -> Script:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 2 and num_asked % 2:
            return Script([b'{"error": {"message": "no room for [b]it"}}'], status=429)
        return serve_well(request)

    async with scripted_server(fail_every_other) as server:
        code = await bench(server, "--model", "m", "--num-requests", "4", "--num-warmups", "1")
    assert code == 0
    output = capsys.readouterr().out
    assert "2 / 2" in output
    assert "2 failed: HTTP 429: no room for [b]it" in output


async def test_an_answer_of_hidden_tokens_is_a_failed_request_of_the_file(tmp_path: Path) -> None:
    def hide_all_but_one(request: Received) -> Script:
        num_tokens = int(str(request.body["max_tokens"]))
        text = [] if num_tokens > 1 else [text_chunk("a")]
        return Script([*text, text_chunk("", finish_reason="length"), usage(5, num_tokens), DONE])

    async with scripted_server(hide_all_but_one) as server:
        flags = ("--model", "m", "--num-requests", "1", "--num-warmups", "0", "--json", str(tmp_path / "run.json"))
        assert await bench(server, *flags) == 1
    (request,) = json.loads((tmp_path / "run.json").read_text())["requests"]
    assert (request["ttft_ms"], request["tpot_ms"]) == (None, None)
    assert request["error"].startswith("stream without a token")


async def test_what_a_prefix_cache_had_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def bench_with(num_cached: int | None) -> tuple[str, Any]:
        script = Script([text_chunk("a", token_ids=[1]), usage(64, 1, num_cached=num_cached), DONE])
        async with scripted_server(lambda _: script) as server:
            flags = ("--model", "m", "--num-requests", "2", "--json", str(tmp_path / "run.json"))
            assert await bench(server, *flags) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text())

    shown, saved = await bench_with(48)
    assert "input tokens from a prefix cache" in shown and "75.0 %" in shown
    assert saved["summary"]["num_cached_tokens"] == 96
    assert [request["num_cached_tokens"] for request in saved["requests"]] == [48, 48]
    for num_cached in (0, None):
        shown, saved = await bench_with(num_cached)
        assert "prefix cache" not in shown and saved["summary"]["num_cached_tokens"] == 0


async def test_how_tokens_were_counted_is_shown_unless_by_their_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def shown_by(*pieces: bytes) -> str:
        async with scripted_server(lambda _: Script([*pieces, DONE])) as server:
            assert await bench(server, "--model", "m", "--num-requests", "2") == 0
        return capsys.readouterr().out

    assert "counted by" not in await shown_by(*answer(1)[:-1])
    assert "chunks (2)" in await shown_by(text_chunk("a"))
    assert "usage (2)" in await shown_by(text_chunk("a"), usage(5, 1))
    differing = await shown_by(text_chunk("a", token_ids=[1, 2, 3]), usage(5, 2))
    assert "usage (2)" in differing
    assert "answers whose token ids are not as many as usage says" in differing
    hidden = await shown_by(chat_chunk(content="a"), usage(5, 4, num_thoughts=3))
    assert "hidden thoughts among them" in hidden and "75.0 %" in hidden


async def test_what_was_sent_twice_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    num_asked = 0

    def be_gone_once(request: Received) -> Script:
        nonlocal num_asked
        num_asked += 1
        return Script([], raw=b"") if num_asked == 3 else serve_well(request)

    async with scripted_server(be_gone_once) as server:
        assert await bench(server, "--model", "m", "--num-requests", "2", "--num-warmups", "1") == 0
    shown = capsys.readouterr().out
    assert "2 / 0" in shown and "sent twice: a kept connection was closed" in shown


async def test_environment_is_described_before_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(program: str, argv: Sequence[str]) -> Environment:
        assert not server.requests
        return describe_environment(program, argv)

    monkeypatch.setattr(subject, "describe_environment", describe)
    async with scripted_server(serve_well) as server:
        argv = ["--base-url", server.base_url, "--model", "m", "--num-requests", "1"]
        assert (await run_bench(parse_options(argv), argv)).environment.cpu


# Only a process of its own may have its limit lowered, or be interrupted.
PROGRAM = """
import resource, sys
from kvferry.tools.load.client import main
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.exit(main(sys.argv[2:]))
"""


async def start_bench(server: ScriptedServer, *argv: str, file_limit: int = 256) -> asyncio.subprocess.Process:
    words = ("-c", PROGRAM, str(file_limit), "--base-url", server.base_url, "--model", "m", *argv)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, *words, stdout=pipe, stderr=pipe)


@pytest.mark.slow
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1024, reason="so many files may not be open here")
async def test_more_may_be_in_flight_than_the_soft_limit_of_files() -> None:
    def serve_slowly(request: Received) -> Script:
        return replace(serve_well(request), after_s=0.5)

    async with scripted_server(serve_slowly) as server:
        flags = ("--request-rate", "inf", "--num-requests", "100", "--output-len", "2", "--num-warmups", "0")
        program = await start_bench(server, *flags, file_limit=64)
        shown, _ = await program.communicate()
    assert program.returncode == 0
    assert "100 / 0" in shown.decode()


@pytest.mark.slow
async def test_interrupted_run_shows_and_saves_what_had_finished(tmp_path: Path) -> None:
    are_stuck, num_asked = asyncio.Event(), 0

    def answer_three(request: Received) -> Script:
        nonlocal num_asked
        num_asked += 1
        if num_asked <= 1 + 3:  # probe, and the run's
            return serve_well(request)
        if num_asked == 1 + 3 + 2:
            are_stuck.set()
        return Script(answer(2)[:2], is_stuck=True)

    path = tmp_path / "run.json"
    async with scripted_server(answer_three) as server:
        flags = ("--max-concurrency", "2", "--num-warmups", "0", "--json", str(path))
        program = await start_bench(server, *flags)
        await are_stuck.wait()
        program.send_signal(signal.SIGINT)
        shown, errors = await program.communicate()
    assert program.returncode == 130
    assert errors.decode() == "kvferry bench: interrupted; the figures are of what had finished\n"
    assert "3 / 0" in shown.decode() and "interrupted; in flight then, and left out" in shown.decode()
    saved = json.loads(path.read_text())
    assert (saved["num_cut_off"], saved["summary"]["num_ok"], len(saved["requests"])) == (2, 3, 3)


@pytest.mark.slow
async def test_run_that_is_interrupted_before_an_answer_has_measured_nothing(tmp_path: Path) -> None:
    is_asked = asyncio.Event()

    def be_silent(_: Received) -> Script:
        is_asked.set()
        return Script([], is_stuck=True)

    path = tmp_path / "run.json"
    async with scripted_server(be_silent) as server:
        program = await start_bench(server, "--json", str(path))
        await is_asked.wait()
        program.send_signal(signal.SIGINT)
        _, errors = await program.communicate()
    assert (program.returncode, errors.decode()) == (130, "kvferry bench: interrupted, nothing measured\n")
    assert not path.exists()


async def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    async with scripted_server(serve_well) as server:
        assert await bench(server, "--model", "[b]m[/x]", "--num-requests", "1") == 0
    assert "[b]m[/x] at http://" in capsys.readouterr().out


async def test_run_without_a_single_answer_is_told_by_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    is_probe = True

    def fail_later(request: Received) -> Script:
        nonlocal is_probe
        was_probe, is_probe = is_probe, False
        return serve_well(request) if was_probe else Script(answer(2)[:1], is_cut=True)

    async with scripted_server(fail_later) as server:
        code = await bench(server, "--model", "m", "--num-requests", "3", "--num-warmups", "0")
    assert code == 1
    assert "3 failed: connection closed before the end of the answer" in capsys.readouterr().out


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": 5}'])
async def test_what_lists_no_models_is_said(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    async with scripted_server(lambda _: Script([body])) as server:
        assert await bench(server, "--num-requests", "1") == 2
    assert "/v1/models is no list of models" in capsys.readouterr().err


@pytest.mark.parametrize("keys", ["first,second", " first ,second", ",first"])
async def test_the_first_key_of_the_environment_is_sent_as_the_router_reads_it(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, keys)
    for flags, key in (([], "first"), (["--api-key", "own"], "own")):
        async with scripted_server(serve_well) as server:
            argv = ["--base-url", server.base_url, "--num-requests", "1", *flags]
            await run_bench(parse_options(argv), argv)
        assert {request.headers["authorization"] for request in server.requests} == {f"bearer {key}"}


async def test_server_without_return_token_ids_is_asked_without_them() -> None:
    def refuse_the_field(request: Received) -> Script:
        if "return_token_ids" in request.body:
            return Script([b'{"error": {"message": "unknown field: return_token_ids"}}'], status=400)
        return Script([text_chunk("two words"), usage(5, 2), DONE])

    async with scripted_server(refuse_the_field) as server:
        argv = ["--base-url", server.base_url, "--model", "m", "--num-requests", "2"]
        report = await run_bench(parse_options(argv), argv)
    assert report.summary.counted_by == {"usage": 2}
    assert report.summary.num_output_tokens == 4


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Script([b'{"error": {"message": "no such model"}}'], status=404), "HTTP 404: no such model"),
        (Script([event(error="broken"), DONE]), "error event: broken"),
    ],
)
async def test_server_that_answers_no_probe_is_a_wrong_setting(
    script: Script, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scripted_server(lambda _: script) as server:
        assert await bench(server, "--model", "m") == 2
    assert message in capsys.readouterr().err


async def test_several_models_must_be_chosen_from(capsys: pytest.CaptureFixture[str]) -> None:
    listing = Script([b'{"data": [{"id": "a"}, {"id": "b"}]}'])
    async with scripted_server(lambda _: listing) as server:
        assert await bench(server) == 2
    assert "2 models (a, b): choose one with --model" in capsys.readouterr().err


async def test_open_loop_sends_at_poisson_times() -> None:
    async with scripted_server(serve_well) as server:
        argv = ["--base-url", server.base_url, "--request-rate", "500", "--num-requests", "10", "--output-len", "2"]
        report = await run_bench(parse_options(argv), argv)
    assert report.load == "open loop, Poisson 500/s"
    assert (report.summary.num_ok, report.summary.late_ms.count) == (10, 10)
    assert [record.index for record in report.records] == list(range(10))


TRACE = """\
{"timestamp": 0, "input_length": 40, "output_length": 4}
{"timestamp": 100, "input_length": 80, "output_length": 6}
"""


async def test_trace_is_replayed_with_its_lengths_and_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    async with scripted_server(serve_well) as server:
        argv = ["--base-url", server.base_url, "--trace", str(path), "--trace-scale", "0.5", "--trace-rate-scale", "10"]
        report = await run_bench(parse_options(argv), argv)
    assert [(record.num_prompt_tokens, record.num_output_tokens) for record in report.records] == [(20, 2), (40, 3)]
    assert report.load == "open loop, the trace's arrivals at 10 times its rate"
    assert report.workload == "lengths of trace.jsonl times 0.5"


async def test_a_trace_is_read_once_and_may_be_a_pipe() -> None:
    reading, writing = os.pipe()
    os.write(writing, TRACE.encode())
    os.close(writing)
    async with scripted_server(serve_well) as server:
        argv = ["--base-url", server.base_url, "--trace", f"/dev/fd/{reading}", "--num-warmups", "1"]
        report = await run_bench(parse_options(argv), argv)
    os.close(reading)
    assert [record.num_prompt_tokens for record in report.records] == [40, 80]


async def test_no_more_requests_are_asked_for_than_a_trace_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    async with scripted_server(serve_well) as server:
        assert await bench(server, "--trace", str(path), "--num-requests", "3") == 2
        assert not server.requests
        assert f"--num-requests 3: --trace {path} ends after 2, and is not begun anew" in capsys.readouterr().err
        assert await bench(server, "--trace", str(path), "--num-requests", "1", "--max-concurrency", "1") == 0


async def test_a_file_that_cannot_be_written_costs_neither_the_table_nor_the_other_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "run.svg"
    async with scripted_server(serve_well) as server:
        assert await bench(server, "--num-requests", "1", "--json", "/dev/full", "--plot", str(plot)) == 2
    shown = capsys.readouterr()
    assert shown.err == "kvferry bench: /dev/full cannot be written: No space left on device\n"
    assert plot.exists() and "requests ok / failed" in shown.out


async def test_what_is_wrong_with_a_trace_is_told_before_anybody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE + "{\n")
    async with scripted_server(serve_well) as server:
        assert await bench(server, "--trace", str(path)) == 2
        assert not server.requests
    assert f"--trace {path}, line 3" in capsys.readouterr().err


def test_trace_can_give_lengths_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    options = parse_options(["--trace", str(path), "--request-rate", "inf"])
    planned = list(plan_requests(options, read_rows(options)))
    assert [(len(request.prompt), request.arrival_s) for request in planned] == [(40, 0.0), (80, 0.0)]


def test_load_is_one_in_flight_and_100_requests_unless_told() -> None:
    options = parse_options([])
    assert (options.max_concurrency, options.num_requests, options.prompt) == (1, 100, "ids")
    timed = parse_options(["--duration", "5", "--endpoint", "chat", "--tpot-slo-ms", "50"])
    assert (timed.num_requests, timed.duration_s, timed.prompt, timed.slo) == (None, 5.0, "text", Slo(None, 50.0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--request-rate 1 --max-concurrency 1", "give one of them"),
        ("--endpoint chat --prompt ids", "chat takes text"),
        ("--request-rate inf --duration 5", "add --num-requests"),
        ("--trace t --input-len 512", "--input-len: lengths are those of --trace; --trace-scale multiplies them"),
        ("--trace t --output-len 9", "--output-len: lengths are those of --trace"),
        ("--trace-scale 1", "--trace-scale: there is no trace: name one with --trace"),
        ("--trace-rate-scale 2", "--trace-rate-scale: there is no trace"),
        ("--trace t --trace-rate-scale 2 --request-rate 1", "--trace-rate-scale: --request-rate takes no arrivals"),
        (
            "--trace t --trace-rate-scale 2 --max-concurrency 1",
            "--trace-rate-scale: --max-concurrency takes no arrivals",
        ),
        ("--json absent/run.json", "there is no directory absent"),
        ("--plot run.jpg", "must end in .svg or .png"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(flags.split())


@pytest.mark.parametrize("flags", ["--request-rate 0", "--input-len -1", "--duration nan", "--endpoint images"])
def test_senseless_values_end_with_the_usage(flags: str) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_options(flags.split())
    assert raised.value.code == 2
