"""Traces: by name, checked, scaled, spiked, repeated; and the oracle's infinite cache."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator import Day, Spike, Traffic, sources
from kvferry.simulator.adapters import adapter_use
from kvferry.simulator.jobs import make_job
from kvferry.simulator.oracle import bound, infinite_cache
from kvferry.simulator.traffic import arrivals, mean_rate, rows_of, spread_ticks
from kvferry.tools.load.traces import TraceRow

from .runs import azure, mooncake

ROWS = tuple(TraceRow(float(number), 1100, 10, block_ids=(0, 1 + number, 50)) for number in range(5))


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_named_trace_has_a_small_sample(name: str) -> None:
    path = sources.trace_path(f"sample:{name}")
    assert path.stat().st_size < 300_000
    rows = rows_of(Traffic(f"sample:{name}"))
    assert len(rows) >= 600 and mean_rate(rows) > 0.1


def test_a_download_that_is_not_the_published_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SHA-256"):
        sources.fetch("azure-2023-conv", tmp_path, download=lambda url: b"something else")
    assert not list(tmp_path.iterdir())


def test_a_trace_is_downloaded_once(tmp_path: Path) -> None:
    content, asked = b"a trace", list[str]()
    known = {"x": sources.Source("https://example.org/x", hashlib.sha256(content).hexdigest(), "CC0", "x.csv")}

    def download(url: str) -> bytes:
        asked.append(url)
        return content

    assert sources.fetch("x", tmp_path / "cache", known, download=download).read_bytes() == content
    assert sources.fetch("x", tmp_path / "cache", known, download=download).read_bytes() == content
    assert asked == ["https://example.org/x"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    content, file = b"a trace", tmp_path / "file"
    known = {"x": sources.Source("https://example.org/x", hashlib.sha256(content).hexdigest(), "CC0", "x.csv")}
    file.write_text("")
    with pytest.raises(ConfigError, match=r"trace x: .*file/x\.csv"):
        sources.fetch("x", file, known, download=lambda url: content)


def test_a_half_without_requests_is_said() -> None:
    with pytest.raises(ConfigError, match="the first half of the trace has no requests"):
        rows_of(Traffic(ROWS[:1], part="first"))


def test_what_is_neither_a_name_nor_a_file_is_refused() -> None:
    for name in ("no-such-trace", "x" * 300):  # no file system has names so long
        with pytest.raises(ConfigError, match="azure-2023-code"):
            sources.trace_path(name)


def test_a_trace_may_lie_at_home_and_downloads_are_kept_with_what_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.csv").write_text("")
    assert sources.trace_path("~/mine.csv") == tmp_path / "mine.csv"
    monkeypatch.setattr(sources, "fetch", lambda name, folder: folder / name)
    monkeypatch.setenv("KVFERRY_CACHE", "~/kept")
    assert sources.trace_path("azure-2023-conv") == tmp_path / "kept" / "traces" / "azure-2023-conv"


def test_recorded_arrivals_are_scaled_to_the_wished_rate() -> None:
    times = [time_s for time_s, _ in arrivals(Traffic(ROWS, rate_per_s=2.0))]
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])


def test_halves_of_a_trace_begin_at_zero_and_share_no_request() -> None:
    first, second = rows_of(Traffic(ROWS, part="first")), rows_of(Traffic(ROWS, part="second"))
    assert [row.arrival_s for row in first] == [0.0, 1.0]
    assert [row.arrival_s for row in second] == [0.0, 1.0, 2.0]


def test_requests_of_one_tick_of_the_recording_are_spread_until_the_next() -> None:
    rows = tuple(TraceRow(3.0 * (number // 4), 10, 10) for number in range(12))
    times = [row.arrival_s for row in rows_of(Traffic(rows))]
    assert times == sorted(times) and len(set(times[:8])) == 8
    assert all(0 <= time_s < 3 for time_s in times[:4]) and all(3 <= time_s < 6 for time_s in times[4:8])


def test_the_last_tick_is_spread_as_well_where_that_is_asked_for() -> None:
    rows = [TraceRow(at_s, number, 1) for number, at_s in enumerate([0.0, 0.0, 0.0, 3.0, 6.0, 6.0])]
    spread = spread_ticks(rows, last_too=True)
    times = [row.arrival_s for row in spread]
    assert [row.num_prompt_tokens for row in spread] == list(range(6))
    assert times == sorted(times) and len(set(times)) == 6
    assert all(0.0 <= at_s < 3.0 for at_s in times[:3]) and times[3] == 3.0
    assert all(6.0 <= at_s < 9.0 for at_s in times[4:])
    assert spread == spread_ticks(rows, last_too=True)


def test_a_repeated_trace_shares_no_prefix_with_its_first_round() -> None:
    rows = [row for _, row in arrivals(Traffic(ROWS, num_requests=10))]
    first, second = ({block for row in part for block in row.block_ids} for part in (rows[:5], rows[5:]))
    assert len(first) == len(second) and first.isdisjoint(second)


def test_a_repeated_trace_may_have_any_ids() -> None:
    rows = tuple(replace(row, block_ids=(-20, number - 10, 3)) for number, row in enumerate(ROWS))
    found = [row for _, row in arrivals(Traffic(rows, num_requests=10))]
    first, second = ({block for row in part for block in row.block_ids} for part in (found[:5], found[5:]))
    assert len(first) == len(second) == 7 and first.isdisjoint(second)


def test_a_rate_is_refused_where_the_traces_times_do_not_differ() -> None:
    rows = tuple(replace(row, arrival_s=0.0) for row in ROWS)
    with pytest.raises(ConfigError, match=r"rate: the trace's 5 requests all come at one time.*\(--poisson\)"):
        list(arrivals(Traffic(rows, rate_per_s=0.1)))
    assert [time_s for time_s, _ in arrivals(Traffic(rows))] == [0.0] * 5
    assert list(arrivals(Traffic(rows, rate_per_s=0.1, arrivals="poisson")))[-1][0] > 5
    lone = [time_s for time_s, _ in arrivals(Traffic(rows[:1], rate_per_s=0.5, num_requests=3))]
    assert lone == [0.0, 2.0, 4.0]  # a round has the length of a request


def test_poisson_arrivals_have_the_wished_rate_and_repeat_with_their_seed() -> None:
    traffic = Traffic(ROWS, arrivals="poisson", rate_per_s=10.0, num_requests=2000, seed=3)
    times = [time_s for time_s, _ in arrivals(traffic)]
    assert times[-1] == pytest.approx(200, rel=0.1)
    assert times == [time_s for time_s, _ in arrivals(traffic)]


def test_spikes_and_days_make_arrivals_denser() -> None:
    spiked = [
        time_s for time_s, _ in arrivals(Traffic(ROWS, rate_per_s=10.0, num_requests=400, spikes=(Spike(5, 5, 10),)))
    ]
    assert sum(5 <= time_s < 10 for time_s in spiked) > 0.6 * 400
    day = Traffic(ROWS, rate_per_s=10.0, num_requests=2000, day=Day(period_s=100, low=0.1))
    times = [time_s for time_s, _ in arrivals(day)]
    assert sum(40 <= time_s < 60 for time_s in times) > 5 * sum(time_s < 10 for time_s in times)


def test_a_traces_blocks_become_the_hashes_of_a_jobs_blocks() -> None:
    one, other = (make_job(number, ROWS[number], 0.0, 512, hashed=True) for number in range(2))
    assert len(one.block_hashes) == (1100 + 10) // 512
    assert one.block_hashes[0] == other.block_hashes[0] and one.block_hashes[1] != other.block_hashes[1]
    halves = make_job(0, ROWS[0], 0.0, 256, hashed=True)
    assert len(set(halves.block_hashes)) == len(halves.block_hashes) == 4


@pytest.mark.parametrize("block_tokens", [100, 512, 600, 1024, 2048])
def test_blocks_of_any_length_are_shared_as_far_as_prompts_are_equal(block_tokens: int) -> None:
    rows = [TraceRow(0.0, 3000, 10, block_ids=(0, 1, 2, 3, last, 9 + last)) for last in (4, 5)]
    one, other = (make_job(n, row, 0.0, block_tokens, hashed=True).block_hashes for n, row in enumerate(rows))
    assert len(set(one)) == len(one) == 3010 // block_tokens
    same = [mine == theirs for mine, theirs in zip(one, other, strict=True)]
    assert sum(same) == 4 * 512 // block_tokens and same == sorted(same, reverse=True)


@pytest.mark.parametrize("block_id", [-5123, 2**63 - 1, 9_800_000_000_000_000_000, 2**64, 10**30])
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_a_trace_may_name_blocks_by_any_number(block_id: int, block_tokens: int) -> None:
    rows = [TraceRow(0.0, 1536, 10, block_ids=(block_id, last, 3)) for last in (7, 8)]
    one, other = (make_job(n, row, 0.0, block_tokens, hashed=True).block_hashes for n, row in enumerate(rows))
    assert len(set(one)) == len(one) == 1546 // block_tokens
    assert sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) == 2 * 512 // block_tokens


def test_no_adapters_blocks_are_anothers_however_many_there_are() -> None:
    row = TraceRow(0.0, 1024, 512, block_ids=(1, 2))
    numbers = (0, 1, 32_767, 32_768, 65_536, 1_000_000)
    jobs = [make_job(n, row, 0.0, 512, hashed=True, adapter=adapter_use(number, 1)) for n, number in enumerate(numbers)]
    hashes = [value[:8] for job in jobs for value in job.block_hashes]
    assert len(set(hashes)) == len(hashes) == 3 * len(numbers)


def test_an_infinite_cache_finds_leading_blocks_alone() -> None:
    rows = [TraceRow(0, 1536, 1, (7, 8, 9)), TraceRow(1, 1537, 1, (7, 8, 9)), TraceRow(2, 1536, 1, (1, 8, 9))]
    assert infinite_cache(rows) == [0, 1536, 0]
    assert infinite_cache([rows[0], rows[0]]) == [0, 1024]  # the last token is computed


def test_nobody_does_better_than_the_oracle() -> None:
    for scenario in (azure(), mooncake()):
        found = bound(scenario)
        assert 0 < found.prefill_share < 1
        assert found.goodput_per_s > scenario.traffic.rate_per_s  # type: ignore[operator]
