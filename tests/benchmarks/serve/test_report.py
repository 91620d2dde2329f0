from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.benchmarks.serve.client import Cell, ClientRun, failed_run
from kvferry.benchmarks.serve.plot import plot_serve
from kvferry.benchmarks.serve.report import (
    Comparison,
    Row,
    ServeReport,
    Spread,
    compare,
    load_report,
    print_serve,
    read_report,
    spread_text,
    write_report,
)
from kvferry.benchmarks.serve.terms import Terms
from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import CoreUse, QuietWait
from kvferry.tools.load.environment import describe_environment

CELL, BUSY = Cell(128, 64, 1, 8), Cell(512, 64, 16, 48)
TERMS = Terms("m", 2, 32768, "a client", "a CPU", "bfloat16", "")
ENVIRONMENT = describe_environment("serve", [])


def client_run(ttft_ms: float, tpot_ms: float = 10.0, tokens_per_s: float = 100.0) -> ClientRun:
    return ClientRun(
        round=0,
        seed=1,
        num_completed=8,
        num_failed=0,
        problems=(),
        median_ttft_ms=ttft_ms,
        median_tpot_ms=tpot_ms,
        p99_itl_ms=20.0,
        output_tokens_per_s=tokens_per_s,
        quiet=QuietWait(1.0, 0.1),
        cores=CoreUse(0.2, 1.5, 0.02),
    )


def row(system: str, *runs: ClientRun, cell: Cell = CELL) -> Row:
    return Row(system, cell, "about", ENVIRONMENT, runs)


def report_of(*rows: Row) -> ServeReport:
    report = ServeReport(TERMS)
    for one in rows:
        report = report.with_row(one)
    return report


def compare_one(*rows: Row) -> Comparison:
    (comparison,) = compare(report_of(*rows))
    return comparison


def shown(report: ServeReport) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_serve(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figure_is_the_median_of_the_runs_with_their_range() -> None:
    spread = row("vllm-agg", client_run(30), client_run(10), client_run(11)).spread("median_ttft_ms")
    assert spread == Spread(11, 10, 30)
    assert spread_text(spread) == "11.0 (10.0-30.0)"
    assert spread_text(Spread(99064, 99064, 99064)) == "99,064"
    assert spread_text(None) == "-"


def test_run_without_figures_is_left_out_of_the_median_but_counted() -> None:
    one = row("vllm-agg", client_run(10), failed_run(CELL, 0, 1, "gone"))
    assert one.spread("median_ttft_ms") == Spread(10, 10, 10)
    assert (one.num_failed, one.is_clean, one.problems) == (8, False, ["gone"])


@pytest.mark.parametrize(("ours", "verdict"), [(90.0, "met"), (91.0, "missed"), (200.0, "missed")])
def test_colocated_must_stay_below_nine_tenths(ours: float, verdict: str) -> None:
    ratio = compare_one(row("kvferry-co", client_run(ours)), row("vllm-agg", client_run(100.0))).ratios[
        "median_ttft_ms"
    ]
    assert (ratio.bar, ratio.verdict) == (0.9, verdict)
    assert ratio.value == pytest.approx(ours / 100)


def test_disaggregated_must_stay_below_eight_tenths_of_each_split_peer() -> None:
    ours = row("kvferry-pd", client_run(85.0, 7.0))
    comparisons = compare(
        report_of(ours, row("vllm-pd", client_run(100.0)), row("vllm-pd-shared", client_run(110.0)), row("vllm-agg"))
    )
    verdicts = {
        one.peer: (one.ratios["median_ttft_ms"].verdict, one.ratios["median_tpot_ms"].verdict) for one in comparisons
    }
    assert verdicts == {"vllm-pd": ("missed", "met"), "vllm-pd-shared": ("met", "met")}


def test_throughput_has_a_bar_where_many_requests_are_in_flight() -> None:
    few = compare_one(row("kvferry-co", client_run(1)), row("vllm-agg", client_run(1)))
    assert few.ratios["output_tokens_per_s"].verdict == ""
    peer = row("vllm-agg", client_run(1, tokens_per_s=100), cell=BUSY)
    for tokens_per_s, verdict in ((110.5, "met"), (109.0, "missed")):
        many = compare_one(row("kvferry-co", client_run(1, tokens_per_s=tokens_per_s), cell=BUSY), peer)
        assert many.ratios["output_tokens_per_s"].verdict == verdict


def test_no_bar_is_met_with_failed_requests() -> None:
    failing = row("kvferry-co", client_run(1), failed_run(CELL, 0, 1, "reset"))
    ratio = compare_one(failing, row("vllm-agg", client_run(100))).ratios["median_ttft_ms"]
    assert str(ratio) == "0.01 missed"


def test_peer_that_failed_is_not_beaten() -> None:
    ours = row("kvferry-co", client_run(1))
    lame = row("vllm-agg", replace(client_run(100), num_failed=1, problems=("reset",)))
    dead = row("vllm-agg", failed_run(CELL, 0, 1, "no start"))
    assert compare_one(ours, lame).ratios["median_ttft_ms"].verdict == "not compared"
    assert str(compare_one(ours, dead).ratios["median_tpot_ms"]) == "- not compared"


def test_rerun_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "serve.json"
    write_report(report_of(row("kvferry-co", client_run(9)), row("vllm-agg", client_run(8))), path)
    again = load_report(path, TERMS).with_row(row("kvferry-co", client_run(7)))
    write_report(again, path)
    saved = load_report(path, TERMS)
    assert saved == again
    assert [(one.system, one.runs[0].median_ttft_ms) for one in saved.rows] == [("kvferry-co", 7), ("vllm-agg", 8)]
    assert json.loads(path.read_text())["rows"][0]["runs"][0]["cores"]["foreign"] == 0.02
    assert list(path.parent.iterdir()) == [path]


def test_figures_measured_on_other_terms_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    assert load_report(path, TERMS) == ServeReport(TERMS)
    write_report(report_of(row("vllm-agg", client_run(8))), path)
    for change in ({"num_cores": 4}, {"cpu": "other"}, {"vllm_dtype": "float32"}, {"kvferry_flags": "--dtype float32"}):
        with pytest.raises(ConfigError, match="holds figures of"):
            load_report(path, replace(TERMS, **change))
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_report(path, TERMS)


def test_terms_that_an_older_file_does_not_keep_are_those_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    command = "python -m kvferry.benchmarks.serve --vllm-dtype float32 --kvferry-flags='--cpu-isa avx2' --fresh"
    rows = [replace(row(name, client_run(8)), environment=replace(ENVIRONMENT, command=command)) for name in ("a", "b")]
    write_report(report_of(*rows), path)
    body = json.loads(path.read_text())
    for name in ("cpu", "vllm_dtype", "kvferry_flags"):
        del body["terms"][name]
    path.write_text(json.dumps(body))
    same = replace(TERMS, cpu=ENVIRONMENT.cpu, vllm_dtype="float32", kvferry_flags="--cpu-isa avx2")
    assert load_report(path, same).rows == tuple(rows)
    with pytest.raises(ConfigError, match="cpu='another'"):
        load_report(path, replace(same, cpu="another"))
    body["rows"][0]["environment"]["cpu"] = "another"
    path.write_text(json.dumps(body))
    assert read_report(path).terms.cpu == " | ".join(sorted((ENVIRONMENT.cpu, "another")))  # nothing can be added
    with pytest.raises(ConfigError):
        load_report(path, same)


def test_table_shows_every_row_and_failure_and_counts_the_bars() -> None:
    report = report_of(
        row("vllm-agg", client_run(100, 10)),
        row("kvferry-co", client_run(50, 11)),
        row("kvferry-pd", failed_run(CELL, 0, 1, "HTTP [500]"), cell=BUSY),
    )
    text = shown(report)
    assert "0.50 met" in text
    assert "1.10 missed" in text
    assert "kvferry-pd 512/64/16: HTTP [500]" in text
    assert "bars: 1 met, 1 missed, 0 not compared" in text


def test_runs_that_others_disturbed_are_told() -> None:
    disturbed = replace(client_run(50), cores=CoreUse(0.2, 1.0, 0.7))
    text = shown(report_of(row("kvferry-co", client_run(50), disturbed), row("vllm-agg", client_run(100))))
    assert "more than 0.1 cores during a run of: kvferry-co 128/64/1\n" in text


def test_report_without_peer_has_no_ratios() -> None:
    assert "ratios" not in shown(report_of(row("kvferry-co", client_run(1))))
    assert "system" in shown(ServeReport(TERMS))


def test_plot_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    report = report_of(
        row("kvferry-co", client_run(50), client_run(60)),
        row("vllm-agg", client_run(100)),
        row("vllm-agg", failed_run(BUSY, 0, 1, "gone"), cell=BUSY),
    )
    for name in ("one.svg", "two.svg"):
        plot_serve(report, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
