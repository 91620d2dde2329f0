from __future__ import annotations

import json
from pathlib import Path

from kvferry.benchmarks.speculation.models import write_extended, write_truncated
from kvferry.benchmarks.speculation.speculation import main, request_body
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.tools.load.tiny_model import write_tiny_model

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, make_engine, prompts


def test_two_deployments_are_timed_in_turns_and_say_the_same(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    small = ["--model", str(write_tiny_model(tmp_path / "tiny")), "--rounds", "1", "--requests", "6"]
    code = main([*small, "--json", str(result)])  # what drafts gain a tiny model is chance
    report = json.loads(result.read_text())
    assert code == (0 if all(bar["is_met"] for bar in report["bars"]) else 1)
    assert report["num_differ"] == 0 and report["num_requests"] == 6
    assert [timing["num_streams"] for timing in report["timings"]] == [1, 1, 1, 1, 1, 8]
    assert all(timing["ratio"] > 0 for timing in report["timings"])


def test_made_drafts_say_what_the_model_says_always_or_not(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny", num_layers=3)
    shorter = write_truncated(model, tmp_path / "shorter", 2)
    longer = write_extended(model, tmp_path / "longer", 4)
    assert ModelConfig.from_dir(shorter).num_layers == 2 and ModelConfig.from_dir(longer).num_layers == 7
    answers = {}
    for path in (model, shorter, longer):
        check_checkpoint(path, ModelConfig.from_dir(path))
        driver = Driver(make_engine(path))
        answers[path.name] = driver.generate([driver.add(prompt) for prompt in prompts([5, 20], 500)])
    assert answers["tiny"] == answers["longer"] != answers["shorter"]


def test_a_request_is_the_same_each_time_and_every_temperature_comes() -> None:
    assert request_body(5) == request_body(5)
    assert {request_body(number)["temperature"] for number in range(3)} == {0.0, 0.7, 1.2}
