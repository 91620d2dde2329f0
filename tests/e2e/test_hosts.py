"""Router, prefill and decode worker on three hosts: network namespaces joined by a bridge, nothing shared but that.

Needs root and iproute2; skipped without.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..checkpoints import write_checkpoint
from . import reference
from .cluster import wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)

BRIDGE = "kvferry-br"
HOSTS = {"router": "198.51.100.1", "decode": "198.51.100.2", "prefill": "198.51.100.3"}  # TEST-NET-2: nobody's
PORT, CONTROL_PORT = 8000, 7001


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[None]:
    """A namespace for each host; a pair of virtual cables leads from each into a bridge in a namespace of its own."""
    names = [BRIDGE, *(f"kvferry-{host}" for host in HOSTS)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("-n", BRIDGE, "link", "add", "br0", "type", "bridge")
        _ip("-n", BRIDGE, "link", "set", "br0", "up")
        for host, address in HOSTS.items():
            space = f"kvferry-{host}"
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", host, "netns", BRIDGE)
            _ip("-n", BRIDGE, "link", "set", host, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def _on(host: str, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`kvferry WORDS` on a host. What this process told UCX (to stay on the loopback) is not for it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    command = ["ip", "netns", "exec", f"kvferry-{host}", sys.executable, "-m", "kvferry", *words]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def _curl(path: str, body: dict[str, object] | None = None) -> tuple[int, str]:
    """Ask the router from its own host: status and body."""
    program = (
        "import httpx, json, sys; url, body = sys.argv[1], json.loads(sys.argv[2]); "
        "head = {'Authorization': 'Bearer key'}; "
        "a = httpx.post(url, json=body, headers=head, timeout=60) if body else httpx.get(url, headers=head); "
        "print(a.status_code); print(a.text)"
    )
    command = ["ip", "netns", "exec", "kvferry-router", sys.executable, "-c", program]
    done = subprocess.run(
        [*command, f"http://{HOSTS['router']}:{PORT}{path}", json.dumps(body)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return 0, done.stderr
    status, _, text = done.stdout.partition("\n")
    return int(status), text


def test_three_hosts_that_share_a_secret_hand_kv_over_by_tcp(hosts: None, tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny")
    prompt = [(7 * i * i + 3) % 500 + 4 for i in range(150)]
    [wanted] = reference.greedy(model_dir, [prompt], 12)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    shared = ["--served-model-name", "tiny", "--secret-file", str(secret)]
    control = f"{HOSTS['router']}:{CONTROL_PORT}"
    engine = ["--router", control, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"]
    router = ["--host", HOSTS["router"], "--port", str(PORT), "--api-key", "key"]
    router += ["--control-host", HOSTS["router"], "--control-port", str(CONTROL_PORT), "--no-local-prefill"]
    with (
        _on("router", tmp_path / "router", "router", str(model_dir), *shared, *router),
        _on("decode", tmp_path / "decode", "decode", str(model_dir), *shared, *engine, "--host", HOSTS["decode"]),
        _on("prefill", tmp_path / "prefill", "prefill", str(model_dir), *shared, *engine, "--host", HOSTS["prefill"]),
    ):
        logs = [tmp_path / name for name in HOSTS]
        try:
            wait_until(lambda: _curl("/ready")[0] == 200, "readiness", 60.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(log.read_text()[-1500:] for log in logs)) from error
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        status, text = _curl("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, text + "".join(log.read_text()[-1500:] for log in logs)
        reference.assert_equal([json.loads(text)["choices"][0]["token_ids"]], [wanted], "three hosts")
        wait_until(lambda: "kvferry_kv_transfer_bytes_count 1.0" in _curl("/metrics")[1], "the transfer's report")
