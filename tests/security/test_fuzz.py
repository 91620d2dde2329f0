"""The fuzz run in small: the real router and the real control server as processes, and every attack for an instant."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.benchmarks.fuzz.attacks import ATTACKS
from kvferry.benchmarks.fuzz.frames import FuzzResult
from kvferry.benchmarks.fuzz.fuzz import run_attacks, run_fuzz
from kvferry.benchmarks.fuzz.report import FuzzReport, print_fuzz, write_fuzz
from kvferry.tools.load.environment import describe_environment

from ..router.fakes import write_model_dir

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 260,
    "max_position_embeddings": 4096,
    "eos_token_id": 256,
}
# Those that keep a core busy for long after their instant are for the long run.
QUICK = [
    "slow heads", "slow bodies", "idle connections", "deep json", "wrong keys", "labels without end",
    "connections without end", "clients that leave", "requests in a row without waiting", "heads that are no http",
    "trailers without end", "chunks of one byte",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model_dir(tmp_path_factory.mktemp("model"))
    (path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return path


def test_frames_and_bodies_break_nothing(model_dir: Path, tmp_path: Path) -> None:
    results = run_fuzz(num_frames=5000, num_bodies=500, seed=3, model_dir=model_dir, log_dir=tmp_path)
    assert [result.name for result in results] == ["decoders", "control server", "router"]
    for result in results:
        assert result.failures == []
        assert result.num_sent and result.num_accepted
    assert {"200", "400"} <= set(results[2].outcomes)


@pytest.mark.slow
def test_attacks_break_nothing_and_are_reported(model_dir: Path, tmp_path: Path) -> None:
    console = Console(quiet=True)
    quiet, attacks = run_attacks(QUICK, 0.2, 20, model_dir, tmp_path, console)
    assert [attack.name for attack in attacks] == QUICK and set(QUICK) <= set(ATTACKS)
    for attack in attacks:
        assert attack.failures == () and attack.num_failed_polls == 0, attack
        assert attack.live_ms.count and attack.outcomes
    fuzzed = FuzzResult("decoders", num_sent=1, outcomes=Counter({"200": 1}), rss_before_bytes=100, rss_after_bytes=106)
    report = FuzzReport((fuzzed,), tuple(attacks), quiet, describe_environment("test", []))
    print_fuzz(report, console)
    write_fuzz(report, tmp_path / "fuzz.json")
    written = json.loads((tmp_path / "fuzz.json").read_text())
    assert written["fuzzed"][0]["outcomes"] == {"200": 1} and not written["fuzzed"][0]["is_met"]
    assert len(written["attacks"]) == len(QUICK) and written["bars"]["max_live_p99_ms"] == 50
