"""The handoff measurement: its cases and figures, and one small run between two processes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kvferry.benchmarks.handoff import handoff
from kvferry.benchmarks.handoff.cases import SPECS, TABLES, Handover, Table, arrange, cache_spec
from kvferry.benchmarks.handoff.handoff import main
from kvferry.benchmarks.handoff.pair import Plan
from kvferry.benchmarks.handoff.prefill import HandoffTimes
from kvferry.benchmarks.handoff.report import (
    HandoffReport,
    IdleResult,
    PacedResult,
    Round,
    SizeResult,
    plot_handoff,
    print_handoff,
    write_handoff,
)
from kvferry.common.errors import TransferError
from kvferry.kvcache.blocks import BlockPool
from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.environment import describe_environment
from kvferry.transfer.backends.host_memory import PageArea
from kvferry.transfer.send.sender import MAX_WRITE_BYTES

MIB = 1 << 20


def _times(total_s: float, exposed_s: float = 0.001) -> HandoffTimes:
    return HandoffTimes(total_s, exposed_s, total_s - 0.001, total_s - 0.002, 12, 0.0001, 0.002, 64 * MIB)


def _size(num_bytes: int, *rounds: Round) -> SizeResult:
    return SizeResult("smollm2-135m", 256, "scattered", num_bytes, 7680, 0.02, rounds)


def _report(*sizes: SizeResult, exposed_s: float = 0.001) -> HandoffReport:
    return HandoffReport(
        backend="nixl",
        device="cpu",
        sizes=sizes,
        paced=(PacedResult("smollm2-135m", 8192, "scattered", 2.0, (_times(2.0, exposed_s),)),),
        idle=(IdleResult("idle", 0.001, 0.002),),
        left_out=("llama-3-8b, 2,048 blocks: over --max-bytes",),
        cores=CoreUse(client=0.5, server=0.1, foreign=0.0),
        environment=describe_environment("python -m kvferry.benchmarks.handoff", []),
    )


@pytest.mark.parametrize("table", TABLES)
def test_an_arranged_pool_gives_every_block_once(table: Table) -> None:
    pool, rng = BlockPool(64, 16), random.Random(1)
    for _ in range(2):
        arrange(pool, table, rng)
        pool.check()
        blocks = pool.allocate(64)
        assert sorted(blocks) == list(range(64))
        assert (blocks == sorted(blocks)) is (table == "contiguous")
        pool.free(blocks)


def test_a_prompt_is_cut_into_writes_as_the_sender_cuts_it() -> None:
    spec = SPECS["smollm2-135m"]
    page = spec.page_bytes()
    here, there = PageArea(0, page, 300 * 30), PageArea(1 << 40, page, 300 * 30)
    handover = Handover.of(spec, range(256), range(10, 266), 300)
    writes = handover.runs(here, there)
    assert sum(int(ours[:, 1].sum()) for ours, _ in writes) == 256 * spec.block_bytes()
    assert all(int(ours[:, 1].sum()) <= MAX_WRITE_BYTES for ours, _ in writes)
    assert sum(len(ours) for ours, _ in writes) == 30 + len(writes) - 1  # a layer is one run, cut where a write ends


def test_blocks_are_shipped_in_the_order_of_ours() -> None:
    handover = Handover.of(cache_spec("m", 2, 1, 8), [5, 1, 3], [7, 8, 9], 10)
    assert np.array_equal(handover.local, [1, 3, 5, 11, 13, 15])
    assert np.array_equal(handover.remote, [8, 9, 7, 18, 19, 17])


def test_a_round_that_was_slow_for_all_does_not_change_the_ratio() -> None:
    size = _size(64 * MIB, *(Round(_times(t), 0.9 * t, 0.5 * t) for t in (0.01, 0.05, 0.011)))
    assert size.ratio == pytest.approx(0.9) and size.plain_ratio == pytest.approx(0.5) and size.miss is None


@pytest.mark.parametrize(("num_bytes", "is_missed"), [(64 * MIB, True), (63 * MIB, False)])
def test_the_bar_is_for_prompts_of_64_mib_and_more(num_bytes: int, is_missed: bool) -> None:
    report = _report(_size(num_bytes, Round(_times(0.02), 0.015, 0.01)))
    assert bool(report.misses) is is_missed


def test_a_gpu_has_no_writev_to_be_held_against() -> None:
    size = _size(64 * MIB, Round(_times(0.02), None, 0.01))
    assert (size.ratio, size.writev_s, size.miss) == (None, None, None)


def test_more_than_a_hundredth_of_ttft_exposed_is_a_miss() -> None:
    assert _report(exposed_s=0.02).misses == []
    assert "1.1% of TTFT" in _report(exposed_s=0.022).misses[0]


def test_report_is_printed_written_and_drawn(tmp_path: Path) -> None:
    fast = _size(128 * MIB, Round(_times(0.02), 0.019, 0.01))
    slow = _size(90 * MIB, Round(_times(0.02), 0.01, 0.01))
    report, output = _report(fast, slow), io.StringIO()
    print_handoff(report, Console(file=output, width=120))
    assert "missed: smollm2-135m, 256 blocks, scattered: 0.50 of writev, the bar is 0.80" in output.getvalue()
    assert "left out: llama-3-8b" in output.getvalue()
    write_handoff(report, tmp_path / "new" / "handoff.json")
    body = json.loads((tmp_path / "new" / "handoff.json").read_text())
    assert [round(size["ratio"], 2) for size in body["sizes"]] == [0.95, 0.5]
    assert len(body["misses"]) == 1 and body["paced"][0]["share"] == 0.0005
    plot_handoff(report, tmp_path / "handoff.svg")
    assert (tmp_path / "handoff.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("flags", [["--shapes", "gpt"], ["--blocks", "0"], ["--blocks", "a"], ["--tables", "neat"]])
def test_wrong_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert flags[1] in capsys.readouterr().err


def test_nothing_that_fits_is_told(tmp_path: Path) -> None:
    assert main(["--max-bytes", "10", "--quiet-limit", "0", "--json", str(tmp_path / "h.json")]) == 2


def test_a_small_run_between_two_processes_is_byte_exact_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("nixl_cu12", exc_type=ImportError)
    small = ["--shapes", "smollm2-135m", "--blocks", "4", "--rounds", "2", "--idle", "0.05", "--quiet-limit", "0"]
    paced = ["--prompt-tokens", "64", "--chunk-tokens", "32", "--ttft", "0.05", "--prompts", "1"]
    code = main([*small, *paced, "--json", str(tmp_path / "h.json")])
    body = json.loads((tmp_path / "h.json").read_text())
    assert code == (1 if body["misses"] else 0)
    assert [size["table"] for size in body["sizes"]] == list(TABLES)
    for size in body["sizes"]:
        assert size["num_bytes"] == 4 * SPECS["smollm2-135m"].block_bytes()
        assert {one["handoff"]["num_bytes"] for one in size["rounds"]} == {size["num_bytes"]}
    assert body["paced"][0]["prompts"][0]["total_s"] > body["paced"][0]["exposed_s"] > 0
    assert [idle["state"] for idle in body["idle"]] == ["idle", "a handoff is open"]
    assert (tmp_path / "h.svg").exists()


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_that_is_cut_leaves_what_it_has_in_a_file_that_was_named_alone(
    is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(
        plan: Plan, argv: list[str], console: Console, on_result: Callable[[list[object], list[object]], None]
    ) -> None:
        on_result([], [])
        raise TransferError("the other end is gone")

    path = tmp_path / "handoff.json"
    monkeypatch.setattr(handoff, "measure", cut)
    monkeypatch.setattr(handoff, "_RESULTS", path)
    assert handoff.main(["--quiet-limit", "0", *(["--json", str(path)] if is_named else [])]) == 2
    assert path.exists() == is_named
