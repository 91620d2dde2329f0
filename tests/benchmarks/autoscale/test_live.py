"""The live run's program: what it writes and how it ends, with a fleet that is made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvferry.benchmarks.autoscale import live
from kvferry.benchmarks.autoscale.live import LiveRun, Seen

GROWN = (Seen(0, 1, 1), Seen(1, 2, 2), Seen(2, 1, 1))


@contextmanager
def _nothing(*args: object) -> Iterator[str]:
    yield "an address"


@pytest.mark.parametrize(
    ("fleet", "num_failed", "code"),
    [(GROWN, 0, 0), (GROWN, 1, 1), (GROWN[:1], 0, 1), ((), 0, 1)],
    ids=["shown", "failed", "no growth", "nothing read"],
)
def test_what_was_seen_is_written_and_is_the_exit_code(
    fleet: tuple[Seen, ...], num_failed: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measure(*args: object) -> LiveRun:
        return LiveRun((), fleet, 5, num_failed, 0, (), 1)

    monkeypatch.setattr(live, "ray_nodes", _nothing)
    monkeypatch.setattr(live, "serving", _nothing)
    monkeypatch.setattr(live, "measure", measure)
    path = tmp_path / "live.json"
    assert live.main(["--json", str(path), "--log-dir", str(tmp_path)]) == code
    report = json.loads(path.read_text())
    assert report["is_shown"] == (code == 0) and len(report["run"]["fleet"]) == len(fleet)
    assert report["environment"]["command"].endswith(str(tmp_path))
