"""A prefill worker dies in the middle of its writes: its blocks come back, and only by a fence."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.config import FAILPOINTS_VARIABLE

from ..checkpoints import write_checkpoint
from .cluster import FORKS, UCX_FORKS, serve, wait_until

COMMON = ("--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_model_len=4096)


# One rank by NIXL: test_chaos.py.
@pytest.mark.parametrize(("transfer", "decode_ranks"), [("ucx", 1), ("nixl", 2)])
def test_what_a_killed_writer_held_is_free_again_after_the_agents_are_replaced(
    model_dir: Path, tmp_path: Path, transfer: str, decode_ranks: int
) -> None:
    pytest.importorskip("ucxx" if transfer == "ucx" else "nixl_cu12", exc_type=ImportError)
    drill = tmp_path / "drill"
    env = {FAILPOINTS_VARIABLE: f"@{drill}"}
    flags = ["--prefill", "2", "--no-local-prefill", "--transfer", transfer]
    flags += ["--decode-tensor-parallel-size", str(decode_ranks)]
    forks = UCX_FORKS if transfer == "ucx" else FORKS
    with serve(model_dir, tmp_path / "log", *COMMON, *flags, env=env, forks=forks) as cluster:
        prompt = [(7 + 3 * i * i + i) % 500 + 4 for i in range(600)]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        drill.write_text("transfer.posted=kill")
        answer = cluster.post("/v1/completions", body)  # whoever prefills it first dies: the other one does
        assert not drill.exists()
        wait_until(lambda: "transfer_agents_replaced" in cluster.log.read_text(), "a fence")
        for state in ("granted", "quarantined", "active"):
            wait_until(
                lambda state=state: cluster.metric("kvferry_blocks", f'state="{state}"') == 0, f"no block {state}"
            )
        again = cluster.post("/v1/completions", {**body, "prompt": [5, *prompt]})  # through the new agents
        assert again["usage"]["completion_tokens"] == 8  # type: ignore[index]  # JSON
        assert cluster.post("/v1/completions", body)["choices"] == answer["choices"]
