from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.benchmarks.gpu.timing import busy_s
from kvferry.benchmarks.shared.rates import MeasuredRates, best_of, last_level_cache_bytes


def test_best_of_each_kind_counts_with_how_it_was_measured() -> None:
    early, late = MeasuredRates(100.0, 5.0, "m1", "r1"), MeasuredRates(90.0, 6.0, "m2", "r2")
    best = best_of([early, late])
    assert best == MeasuredRates(100.0, 6.0, "m1", "r2")


def test_largest_cache_is_read_from_the_kernel(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "absent") == 0


def test_kernels_that_overlap_keep_the_device_busy_once() -> None:
    assert busy_s([(10.0, 20.0), (0.0, 5.0), (15.0, 30.0), (16.0, 17.0)]) == pytest.approx(25e-6)
    assert busy_s([]) == 0
