"""A request that ends every worker that runs it: what it does to the pool, and to those who ask beside it."""

from __future__ import annotations

from pathlib import Path

from kvferry.common.config import FAILPOINTS_VARIABLE
from kvferry.tools.load.tiny_model import write_tiny_model

from .cluster import serve, wait_until

FLAGS = ("--served-model-name", "tiny", "--kv-cache-memory-bytes", "8MiB", "--num-threads", "1")
POISON = 420


def test_who_dies_of_a_known_suspect_is_started_again_without_a_pause(tmp_path: Path) -> None:
    """The first loss may be the worker's own fault, the second and third are not: the launcher hears so.

    Each life ends in its sixth step, and steps are slow: one that ends before a token has left it has not been seen to
    compute anything, and is not counted.
    """
    model, log = write_tiny_model(tmp_path / "tiny"), tmp_path / "log"
    env = {FAILPOINTS_VARIABLE: f"decode.stepped=slow@*, decode.step=kill@6:{POISON}"}
    with serve(model, log, *FLAGS, "--prefill", "0", env=env) as cluster:
        body = {"prompt": [*range(10, 40), POISON], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = cluster.client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "poison_request")
        wait_until(lambda: cluster.client.get("/ready").status_code == 200, "the worker is back")
        assert cluster.post("/v1/completions", body | {"max_tokens": 4})["choices"], "it was not the prompt"
        restarts = [line for line in log.read_text().splitlines() if "d-0" in line and "starting again" in line]
        assert len(restarts) == 3 and not any("in 1 s" in line for line in restarts), "only the first one counts"
