"""One fault at a time on real workers over real NIXL: every stream is to the byte what it is without, and all blocks
come back.

One cluster serves all tests; the worker that died is back before the next one begins.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from kvferry.router.state.worker import HEARTBEAT_LIMIT_S
from kvferry.tools.load.tiny_model import write_tiny_model

from .cluster import serve, serve_by_hand, wait_until
from .drill import Drill, LocalDrill, ask

pytestmark = pytest.mark.slow

FLAGS = ("--served-model-name", "tiny", "--deterministic", "--prefill", "2", "--decode", "2")
WORKERS = ("p-0", "p-1", "d-0", "d-1")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDrill]:
    folder = tmp_path_factory.mktemp("chaos")
    failpoints: Path = folder / "failpoints"
    model_dir = write_tiny_model(folder / "tiny")
    env = Drill.environment(failpoints)
    with serve(model_dir, folder / "log", *FLAGS, "--kv-cache-memory-bytes", "8MiB", env=env) as cluster:
        drill = LocalDrill(failpoints, len(WORKERS), cluster=cluster)
        drill.settle()
        drill.learn()
        yield drill
        drill.settle()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("grant.issued=kill", id="the decode worker dies with the grant in its hand"),
        pytest.param("prefill.chunk=kill", id="the prefill worker dies before its first chunk"),
        pytest.param("transfer.write=kill@1", id="the prefill worker dies before its writes"),
        pytest.param("transfer.posted=kill@3", id="the prefill worker dies between its writes"),
        pytest.param("transfer.arrived=kill", id="the prefill worker dies after its writes, untold"),
        pytest.param("transfer.posted=stop@3", id="the prefill worker stops between its writes and is killed"),
        pytest.param("decode.adopt=kill", id="the decode worker dies when it takes over"),
        pytest.param("decode.step=kill@40", id="the decode worker dies in mid-stream"),
        pytest.param("decode.stepped=kill@40", id="the decode worker dies with tokens that nobody has seen"),
        pytest.param("decode.step=raise@40", id="the decode worker's engine fails"),
        pytest.param("decode.step=memory@40", id="the decode worker runs out of memory"),
        pytest.param("decode.step=stop@40", id="the decode worker hangs"),
    ],
)
def test_streams_are_whole_though(drill: LocalDrill, fault: str) -> None:
    drill.arm(fault)
    drill.check(drill.stream())
    assert drill.has_acted
    drill.settle(quarantine_ends=False)


def test_streams_are_whole_though_a_block_is_not_what_was_written(drill: LocalDrill) -> None:
    drill.arm("kv.corrupt=flip")
    drill.check(drill.stream())
    drill.settle(quarantine_ends=False)
    assert drill.has_acted
    # A worker that has nothing else to do tells of it within a second.
    wait_until(lambda: drill.total("kvferry_kv_checksum_failures_total") == 1, "a failure that is told")


@pytest.mark.parametrize("others", [(), ("p-0", "d-0"), WORKERS], ids=["alone", "with one of each pool", "with all"])
def test_streams_are_whole_though_the_router_dies(drill: LocalDrill, others: tuple[str, ...]) -> None:
    """Their clients come back, and say what they have."""
    drill.comes_back = True
    try:
        requests = drill.stream(when_flowing=lambda: drill.kill(("router", *others)))
    finally:
        drill.comes_back = False
    drill.check(requests)
    drill.settle(quarantine_ends=False)


def _events(url: str, at_most: int | None = None, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream; the client leaves when it has so many."""
    with httpx.stream("POST" if body else "GET", url, timeout=60.0, **body) as response:
        events = (
            json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")
        )
        return list(itertools.islice(events, at_most))


def test_responses_that_nobody_waits_for_are_computed_though_the_router_dies(drill: LocalDrill) -> None:
    path, base_url = "/v1/responses", drill.cluster.base_url
    bodies = [{"input": f"Number {n}", "seed": n, "temperature": 1.0, "max_output_tokens": 400} for n in range(6)]

    def said(response: dict[str, Any]) -> list[str]:
        return [response["status"], *(part["text"] for item in response["output"] for part in item["content"])]

    undisturbed = [said(httpx.post(f"{base_url}{path}", json=body, timeout=60.0).json()) for body in bodies]
    streamed = {"background": True, "stream": True}
    followed = _events(f"{base_url}{path}", 8, json=bodies[0] | streamed)
    with drill.workers_stand_still():  # or the last is computed before the router is killed, where workers are quick
        begun = [
            httpx.post(f"{base_url}{path}", json=body | {"background": True}, timeout=60.0).json() for body in bodies
        ]
        drill.kill(("router",))
    found: dict[str, dict[str, Any]] = {}

    def are_all_over() -> bool:
        for state in begun:
            with contextlib.suppress(httpx.TransportError):
                found[state["id"]] = httpx.get(f"{base_url}{path}/{state['id']}", timeout=60.0).json()
        return all(found.get(state["id"], state)["status"] != "in_progress" for state in begun)

    wait_until(are_all_over, "the responses", 60.0)
    assert [said(found[state["id"]]) for state in begun] == undisturbed
    rest = _events(f"{base_url}{path}/{followed[0]['response']['id']}?stream=true&starting_after=7")
    assert [event["sequence_number"] for event in followed + rest] == [*range(8 + len(rest))]
    assert said(rest[-1]["response"]) == undisturbed[0]
    assert "".join(event["delta"] for event in followed + rest if "delta" in event) == undisturbed[0][1]
    assert '"event":"background_response_goes_on"' in drill.cluster.log.read_text()
    drill.settle(quarantine_ends=False)


@pytest.mark.parametrize("victims", [("p-0", "d-0"), WORKERS], ids=["one of each pool", "every worker"])
def test_streams_are_whole_though_workers_of_both_pools_die_at_once(
    drill: LocalDrill, victims: tuple[str, ...]
) -> None:
    drill.check(drill.stream(when_flowing=lambda: drill.kill(victims)))
    drill.settle(quarantine_ends=False)


def test_streams_go_on_where_they_were_though_all_processes_stand_still_for_a_while(drill: LocalDrill) -> None:
    """As in a paused container: nobody takes anybody for hung."""

    def events() -> list[float]:
        log = drill.cluster.log.read_text()
        told = [log.count(f'"event":"{event}"') for event in ("worker_lost", "attempt_failed", "event_loop_stands")]
        return [*told, drill.total("kvferry_retries_total")]

    def stand_still() -> None:
        launcher = psutil.Process(drill.cluster.process.pid)
        processes = [launcher, *launcher.children(recursive=True)]
        for process in processes:
            process.suspend()
        time.sleep(HEARTBEAT_LIMIT_S + 1.0)
        for process in processes:
            process.resume()

    before = events()
    drill.check(drill.stream(when_flowing=stand_still))
    drill.settle(quarantine_ends=False)
    assert events() == before


def test_a_request_that_kills_every_worker_is_refused_and_takes_no_other_with_it(drill: LocalDrill) -> None:
    spoken = {
        token
        for request in drill.references.values()
        for choice in request.answer()
        for token in choice.token_ids
    }  # fmt: skip
    prompts = {token for one in drill.asks for token in one.body["prompt"]}  # type: ignore[attr-defined]  # ids
    magic = max(set(range(4, 425)) - spoken - prompts)
    poison = ask(9, "poison", temperature=0, prompt=[*range(10, 40), magic, 50], is_stream=False)
    drill.arm(f"decode.step=kill@*:{magic}")
    try:
        *others, poisoned = drill.stream([*drill.asks, poison])
    finally:
        drill.failpoints.unlink()
    assert poisoned.failure is not None
    assert (poisoned.failure.code, poisoned.failure.status) == ("poison_request", 500)
    drill.check(others)
    drill.settle(quarantine_ends=False)


def test_a_decode_worker_that_comes_back_from_a_pause_after_its_streams_went_on_changes_nothing(tmp_path: Path) -> None:
    """Nobody kills it: what it has to say about streams that went on elsewhere is not heard, and it serves again."""
    failpoints = tmp_path / "failpoints"
    workers = {"p-0": "prefill", "d-0": "decode", "d-1": "decode"}
    model_dir, flags = write_tiny_model(tmp_path / "tiny"), ("--kv-cache-memory-bytes", "8MiB", "--num-threads", "1")
    env, shared = Drill.environment(failpoints), ("--deterministic",)
    with serve_by_hand(model_dir, tmp_path / "log", workers, *flags, shared=shared, env=env) as cluster:
        drill = LocalDrill(failpoints, len(workers), cluster=cluster)
        drill.settle()
        drill.learn()
        drill.arm("decode.step=stop@40")
        drill.check(drill.stream())
        [stopped] = [child for child in cluster.programs("d-") if child.status() == "stopped"]
        stopped.send_signal(signal.SIGCONT)
        drill.settle()
        ready = {"pool": "decode", "state": "ready"}
        wait_until(lambda: drill.total("kvferry_worker_state", **ready) == 2, "both decode workers")
        drill.check(drill.stream())
        drill.settle()
        assert stopped.is_running()
