"""A prefill worker with plain weights and a decode worker with rounded ones, where an operator says so."""

from __future__ import annotations

from pathlib import Path

from kvferry.launch.preflight import Preflight
from kvferry.settings.fields import ServeSettings

from ..checkpoints import write_checkpoint
from .cluster import serve

FLAGS = ("--served-model-name", "tiny", "--device", "cpu", "--no-local-prefill", "--decode-quantization", "int4")


def test_a_pair_answers_and_its_distance_is_told(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "model")
    with serve(model_dir, tmp_path / "log", *FLAGS, "--mixed-quantization", "plain,int4") as cluster:
        body = {"model": "tiny", "prompt": list(range(4, 60)), "max_tokens": 12, "ignore_eos": True, "temperature": 0}
        assert cluster.post("/v1/completions", body)["usage"]["completion_tokens"] == 12  # type: ignore[index]
        [model] = cluster.client.get("/v1/models").json()["data"]
        assert model["kvferry"]["quantization"] == "int4, plain"
        distance = model["kvferry"]["logprob_distance"]
        assert 0 < distance < 5
    settings = ServeSettings.model_validate(
        {"model": str(model_dir), "port": 0, "decode": {"quantization": "int4"}, "mixed_quantization": "plain,int4"}
    )
    plan = next(check for check in Preflight(settings, {}).checks() if check.name == "plan")
    assert plan.found == f"2 workers, weights int4 and plain: log-probabilities {distance:.3f} apart"
