from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.benchmarks.interference.interference import Scenario, cut_phase, main, measure, run
from kvferry.benchmarks.interference.report import (
    InterferenceReport,
    SystemResult,
    is_growing,
    long_prompts,
    plot_interference,
    print_interference,
    slope,
    write_interference,
)
from kvferry.benchmarks.shared.peers import RunningSystem, Setup
from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.environment import describe_environment

from ..scripted_server import Received, Script, answer, scripted_server

CORES = CoreUse(client=0.1, server=1.5, foreign=0.0)


def stream(sent_s: float, times_s: list[float], counts: list[int], finished_s: float | None = None) -> RequestRecord:
    return RequestRecord(0, sent_s, 99, finished_s=finished_s, chunk_times_s=times_s, chunk_tokens=counts)


def test_gaps_count_in_the_phase_in_which_they_end() -> None:
    record = stream(0.0, [1.0, 9.0, 11.0, 12.0], [1, 1, 1, 1], finished_s=12.0)
    before, after = cut_phase([record], 0.0, 10.0, CORES), cut_phase([record], 10.0, 20.0, CORES)
    assert (before.token_gap_ms.count, before.token_gap_ms.max) == (1, 8000)
    assert (after.token_gap_ms.count, after.token_gap_ms.max) == (2, 2000)
    assert (before.stream_ttft_ms.p50, after.stream_ttft_ms.count) == (1000, 0)
    assert before.stream_tokens_per_s == pytest.approx(0.2)


def test_tokens_of_one_chunk_are_no_time_apart() -> None:
    phase = cut_phase([stream(0.0, [1.0, 2.0], [2, 3], finished_s=2.0)], 0.0, 10.0, CORES)
    assert (phase.token_gap_ms.count, phase.token_gap_ms.max, phase.token_gap_ms.p50) == (4, 1000, 0)
    assert (phase.chunk_gap_ms.count, phase.chunk_gap_ms.p50) == (1, 1000)


def test_gap_that_is_still_open_counts_with_the_time_it_has_lasted() -> None:
    stalled = stream(0.0, [1.0, 2.0], [1, 1])
    assert cut_phase([stalled], 0.0, 10.0, CORES).token_gap_ms.max == 8000
    assert cut_phase([stalled], 10.0, 15.0, CORES).token_gap_ms.max == 5000


def test_stream_that_waits_for_its_first_token_counts_with_the_time_it_has_waited() -> None:
    waiting = stream(4.0, [], [])
    phase = cut_phase([waiting, stream(1.0, [3.0], [1], finished_s=3.0)], 0.0, 10.0, CORES)
    assert (phase.stream_ttft_ms.count, phase.stream_ttft_ms.max, phase.token_gap_ms.count) == (2, 6000, 0)


def test_failed_streams_are_counted() -> None:
    failed = replace(stream(0.0, [1.0], [1], finished_s=3.0), error="cut")
    assert cut_phase([failed], 0.0, 10.0, CORES).num_failed == 1
    assert cut_phase([failed], 10.0, 20.0, CORES).num_failed == 0


def test_long_prompts_are_told_in_order_with_the_one_that_waits() -> None:
    records = [
        stream(0.0, [5.0], [8], finished_s=5.2),
        replace(stream(6.0, [], [], finished_s=6.1), error="HTTP 500: x"),
        stream(7.0, [13.0], [8], finished_s=13.2),
        stream(14.0, [], []),
    ]
    found = long_prompts(records, end_s=16.5)
    assert (found.ttft_s, found.num_answered, found.num_failed) == ((5.0, 6.0), 2, 1)
    assert (found.unanswered_for_s, found.slope_s, found.errors) == (2.5, 1.0, ("HTTP 500: x",))


def test_slope_and_growth_of_a_series() -> None:
    assert slope([1.0, 3.0, 5.0]) == 2.0
    assert slope([4.0]) is None
    assert is_growing([10.0, 15.0, 20.0, 25.0, 30.0, 39.0])
    assert not is_growing([5.0, 4.9, 5.1, 5.0, 4.8, 5.2])
    assert not is_growing([1.0, 9.0])


SCENARIO = Scenario(stream_output_len=4, long_input_len=300, quiet_s=0.05, disturbed_s=0.05)


async def measured(name: str) -> SystemResult:
    def serve(request: Received) -> Script:
        num_tokens, prompt = request.body["max_tokens"], request.body["prompt"]
        assert isinstance(num_tokens, int)
        assert isinstance(prompt, list)
        return Script(answer(num_tokens, len(prompt)))

    async with scripted_server(serve) as server:
        result = await measure(RunningSystem(server.base_url, "m", (), "a scripted server"), name, SCENARIO)
    prompts = [json.dumps(request.body["prompt"]) for request in server.requests]
    assert len(set(prompts)) == len(prompts)
    assert {len(json.loads(prompt)) for prompt in prompts} == {100, 300}
    return result


async def test_both_phases_are_measured_and_reported(tmp_path: Path) -> None:
    result = await measured("one")
    assert result.quiet.token_gap_ms.count > 0
    assert result.disturbed.token_gap_ms.count > 0
    assert result.disturbed.num_failed == 0
    assert result.long_prompts.num_answered > 0

    environment = describe_environment("interference", [])
    report = InterferenceReport("m", str(SCENARIO), (0, 1), (result, replace(result, name="two")), environment)
    shown = io.StringIO()
    print_interference(report, Console(file=shown, width=160))
    assert f"{result.quiet.token_gap_ms.count:,}" in shown.getvalue()
    write_interference(report, tmp_path / "new" / "i.json")
    plot_interference(report, tmp_path / "i.svg")
    plot_interference(report, tmp_path / "again.svg")
    saved = json.loads((tmp_path / "new" / "i.json").read_text())
    assert [system["name"] for system in saved["systems"]] == ["one", "two"]
    assert saved["systems"][0]["quiet"]["token_gap_ms"]["count"] == result.quiet.token_gap_ms.count
    assert (tmp_path / "i.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


async def test_system_that_fails_its_warm_up_is_not_measured() -> None:
    async with scripted_server(lambda _: Script([b"loading"], status=503)) as server:
        with pytest.raises(ConfigError, match="warm-up failed: HTTP 503: loading"):
            await measure(RunningSystem(server.base_url, "m", (), ""), "x", SCENARIO)


def test_system_that_does_not_start_is_left_out(tmp_path: Path) -> None:
    setup = Setup(model_dir=tmp_path, log_dir=tmp_path / "logs", peer_venv=tmp_path / "absent", cores=(0, 1))
    told = io.StringIO()
    assert run(setup, SCENARIO, ["vllm-agg"], Console(file=told)) == []
    assert "vllm-agg: cannot start" in told.getvalue()


def test_unknown_systems_and_plot_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--systems", "sglang"])
    assert "choose from kvferry-pd, kvferry-co, vllm-agg, vllm-pd" in capsys.readouterr().err
    assert main(["--plot", "x.jpg"]) == 2
