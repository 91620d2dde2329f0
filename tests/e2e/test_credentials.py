"""Keys, secrets and the certificate of a running deployment: taken back, given out, rotated while requests run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from kvferry.settings.key_file import add_key, revoke_keys
from kvferry.tools.load.server_process import free_port

from ..certificates import client_context, common_name, write_certificate
from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until

FLAGS = ("--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--device", "cpu")
TLS = client_context()
OLD, NEW = "the first secret of these tests", "the second secret of these tests"


class Site(NamedTuple):
    cluster: Cluster
    key_file: Path
    secret_file: Path
    certificates: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    keys, secret = folder / "keys.yaml", folder / "secret"
    keys.touch(mode=0o600)
    write_secret(secret, OLD)
    model_dir = write_checkpoint(folder / "tiny", max_model_len=4096)
    flags: tuple[str, ...] = (*FLAGS, "--api-key-file", str(keys), "--secret-file", str(secret))
    flags = (*flags, "--routers", "2", "--max-concurrency-per-key", "4")
    files = write_certificate(folder / "certificates")
    by_tls = ("--ssl-certfile", str(files["ssl_certfile"]), "--ssl-keyfile", str(files["ssl_keyfile"]))
    with serve(model_dir, folder / "log", *flags, *by_tls, tls=TLS) as cluster:
        yield Site(cluster, keys, secret, folder / "certificates")


def write_secret(path: Path, *lines: str) -> None:
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")


def ask(cluster: Cluster, key: str) -> int:
    """The status of a short request over a new connection, which any of the routers takes."""
    body = {"prompt": "hi", "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    url = f"{cluster.base_url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=240.0, verify=TLS).status_code


class LongStream:
    """A stream of some seconds on a thread of its own."""

    def __init__(self, cluster: Cluster, key: str, num_tokens: int = 1500) -> None:
        self.events: list[str] = []
        self._args = (cluster.base_url, key, num_tokens)
        self._begun, self._is_unwanted = threading.Event(), False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(60.0)

    def _read(self) -> None:
        base_url, key, num_tokens = self._args
        body = {"prompt": "a long one", "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=base_url, timeout=240.0, verify=TLS) as client,
            client.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
        ):
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line:
                    self.events.append(line)
                    self._begun.set()
                if self._is_unwanted:
                    break

    def leave(self) -> None:
        self._is_unwanted = True
        self._thread.join(60.0)

    def is_whole(self) -> bool:
        self._thread.join(60.0)
        choices = [json.loads(event.removeprefix("data: ")) for event in self.events[:-1]]
        return (
            self.events[-1] == "data: [DONE]"
            and not any("error" in choice for choice in choices)
            and choices[-1]["choices"][0]["finish_reason"] == "length"
        )


def test_a_revoked_key_is_refused_after_sighup_and_other_streams_go_on(site: Site) -> None:
    alice, bob = add_key(site.key_file, "alice", None), add_key(site.key_file, "bob", None)
    assert ask(site.cluster, alice) == 401  # not yet
    site.cluster.command("reload")
    assert ask(site.cluster, alice) == 200
    pids = {child.pid for child in site.cluster.programs()}
    stream = LongStream(site.cluster, bob)
    revoke_keys(site.key_file, "alice")
    site.cluster.process.send_signal(signal.SIGHUP)
    # Every one of the routers, which take connections as they come.
    wait_until(lambda: all(ask(site.cluster, alice) == 401 for _ in range(8)), "the refusal")
    assert stream.is_whole()
    assert ask(site.cluster, bob) == 200
    assert {child.pid for child in site.cluster.programs()} == pids


def test_a_certificate_is_renewed_by_a_reload_and_streams_go_on(site: Site) -> None:
    key = add_key(site.key_file, "carol", None)
    site.cluster.command("reload")
    assert str(site.cluster.status()["http"]).startswith("https://")
    assert name_shown(site.cluster) == "kvferry tests' server"
    stream = LongStream(site.cluster, key)
    write_certificate(site.certificates, "renewed")
    site.cluster.command("reload")
    assert {name_shown(site.cluster) for _ in range(8)} == {"kvferry tests' renewed server"}  # of every router
    assert stream.is_whole()


def test_a_key_has_its_limit_of_all_routers_together(site: Site) -> None:
    key = add_key(site.key_file, "erin", None)
    site.cluster.command("reload")
    streams = [LongStream(site.cluster, key, num_tokens=4000) for _ in range(4)]  # far longer than what is asked beside
    assert [ask(site.cluster, key) for _ in range(8)] == [429] * 8
    for stream in streams:
        stream.leave()
    wait_until(lambda: ask(site.cluster, key) == 200, "room for another")


def name_shown(cluster: Cluster) -> str:
    host, _, port = cluster.base_url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port))) as sock, TLS.wrap_socket(sock, server_hostname=host) as shown:
        return common_name(shown.getpeercert())


def test_a_key_file_that_is_wrong_leaves_all_as_it_was(site: Site) -> None:
    carol = add_key(site.key_file, "carol", None)
    site.cluster.command("reload")
    good = site.key_file.read_text()
    site.key_file.write_text(f"{good}- broken\n")
    port = site.cluster.base_url.rpartition(":")[2]
    command = [sys.executable, "-m", "kvferry", "reload", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240.0)
    assert done.returncode == 1 and "api_key_file" in done.stderr
    assert ask(site.cluster, carol) == 200
    site.key_file.write_text(good)


def test_a_secret_is_rotated_on_a_running_deployment_and_no_request_fails(site: Site) -> None:
    """Added, swapped, taken out; after each step a worker restarts and has to prove it."""
    key = add_key(site.key_file, "dave", None)
    site.cluster.command("reload")
    statuses: list[int] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.wait(0.05):
            statuses.append(ask(site.cluster, key))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    stream = LongStream(site.cluster, key, 3000)
    try:
        for lines in ((OLD, NEW), (NEW, OLD), (NEW,)):
            write_secret(site.secret_file, *lines)
            site.cluster.command("reload")
            site.cluster.command("restart", "p-0")
    finally:
        over.set()
        asking.join()
    assert stream.is_whole()
    assert len(statuses) > 3 and set(statuses) == {200}


KEY, ADMIN_KEY = "sesame-for-clients", "sesame-for-operators"


class Alone(NamedTuple):
    """A deployment of one worker that was given its keys on the command line, a file of its secret, and a pid file."""

    cluster: Cluster
    pid_file: Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("alone")
    path, secret = folder / "pid", folder / "secret"
    write_secret(secret, OLD)
    flags: tuple[str, ...] = (*FLAGS, "--api-key", KEY, f"--admin-key={ADMIN_KEY}", "--admin-port", str(free_port()))
    flags = (*flags, "--prefill", "0", "--pid-file", str(path), "--secret-file", str(secret))
    # A fork's environment is not in /proc.
    with serve(write_checkpoint(folder / "tiny"), folder / "log", *flags, is_fork=False) as cluster:
        yield Alone(cluster, path)


def test_keys_are_in_no_processs_arguments_and_a_secret_in_no_environment(alone: Alone) -> None:
    cluster = alone.cluster
    processes = [psutil.Process(cluster.process.pid), *cluster.children()]
    words = [word for process in processes for word in process.cmdline()]
    assert len(processes) >= 4  # launcher, router, its renderer of chats, decode worker
    assert not [word for word in words if KEY in word or ADMIN_KEY in word]
    assert all("KVFERRY_SECRET" not in process.environ() for process in processes[1:])
    assert ask(cluster, KEY) == 200 and ask(cluster, ADMIN_KEY) == 401
    [admin] = cluster.admin_urls
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert httpx.get(f"{admin}/admin/workers", headers=headers).status_code == 200
    assert httpx.get(f"{admin}/admin/workers").status_code == 401


def test_a_pid_file_is_there_while_its_deployment_is(alone: Alone) -> None:
    """The deployment ends here, and has told no key to its log."""
    cluster, path = alone
    assert int(path.read_text()) == cluster.process.pid
    command = [sys.executable, "-m", "kvferry"]
    shown = subprocess.run(
        [*command, "status", "--pid-file", str(path), "--json"], capture_output=True, text=True, timeout=60.0
    )
    [status] = json.loads(shown.stdout)
    assert status["http"] == cluster.base_url
    assert [row["name"] for row in status["processes"]] == ["router", "d-0"]
    drained = subprocess.run([*command, "drain", "--pid-file", str(path)], timeout=240.0, capture_output=True)
    assert drained.returncode == 0
    assert cluster.process.wait(10.0) == 0
    assert not path.exists()
    assert KEY not in cluster.log.read_text()
    gone = subprocess.run([*command, "status", "--port", str(os.getpid())], timeout=240.0, capture_output=True)
    assert gone.returncode == 3
