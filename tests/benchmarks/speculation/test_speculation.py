from __future__ import annotations

import json
from pathlib import Path

from kvferry.benchmarks.speculation.speculation import main, request_body
from kvferry.tools.load.tiny_model import write_tiny_model


def test_two_deployments_are_timed_in_turns_and_say_the_same(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    small = ["--model", str(write_tiny_model(tmp_path / "tiny")), "--rounds", "1", "--requests", "6"]
    assert main([*small, "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    assert report["num_differ"] == 0 and report["num_requests"] == 6
    assert [timing["num_streams"] for timing in report["timings"]] == [1, 1, 1, 1, 8]
    assert all(timing["ratio"] > 0 for timing in report["timings"])


def test_a_request_is_the_same_each_time_and_every_temperature_comes() -> None:
    assert request_body(5) == request_body(5)
    assert {request_body(number)["temperature"] for number in range(3)} == {0.0, 0.7, 1.2}
