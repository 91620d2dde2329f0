"""Router, prefill and decode worker on three hosts: network namespaces joined by a bridge, nothing shared but that.

Needs root and iproute2; skipped without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..checkpoints import write_checkpoint
from . import reference
from .cluster import START_LIMIT_S, wait_until
from .namespaces import NEEDS_NAMESPACES, Network, network

pytestmark = NEEDS_NAMESPACES

HOSTS = {"router": "198.51.100.1", "decode": "198.51.100.2", "prefill": "198.51.100.3"}  # TEST-NET-2: nobody's
PORT, CONTROL_PORT = 8000, 7001


@pytest.fixture
def hosts() -> Iterator[Network]:
    with network(HOSTS) as net:
        yield net


def _curl(net: Network, path: str, body: dict[str, object] | None = None) -> tuple[int, str]:
    """Ask the router from its own host: status and body."""
    program = (
        "import httpx, json, sys; url, body = sys.argv[1], json.loads(sys.argv[2]); "
        "head = {'Authorization': 'Bearer key'}; "
        "a = httpx.post(url, json=body, headers=head, timeout=240.0) if body else httpx.get(url, headers=head); "
        "print(a.status_code); print(a.text)"
    )
    url = f"http://{HOSTS['router']}:{PORT}{path}"
    done = subprocess.run(
        net.command("router", sys.executable, "-c", program, url, json.dumps(body)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return 0, done.stderr
    status, _, text = done.stdout.partition("\n")
    return int(status), text


def _listening(net: Network, host: str) -> list[str]:
    """The addresses at which processes of a host listen."""
    program = (
        "import json, psutil; links = psutil.net_connections('tcp'); "
        "print(json.dumps(sorted({link.laddr.ip for link in links if link.status == 'LISTEN'})))"
    )
    done = subprocess.run(net.command(host, sys.executable, "-c", program), capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_three_hosts_that_share_a_secret_hand_kv_over_by_tcp(hosts: Network, tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny")
    prompt = [(7 * i * i + 3) % 500 + 4 for i in range(150)]
    [wanted] = reference.greedy(model_dir, [prompt], 12)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    shared = ["--served-model-name", "tiny", "--secret-file", str(secret)]
    control = f"{HOSTS['router']}:{CONTROL_PORT}"
    engine = ["--router", control, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"]
    router = ["--host", HOSTS["router"], "--port", str(PORT), "--api-key", "key"]
    router += ["--control-host", HOSTS["router"], "--control-port", str(CONTROL_PORT), "--no-local-prefill"]
    for number, host in enumerate(HOSTS):
        hosts.add_interface(host, f"203.0.113.{number + 1}")
    with (
        hosts.running("router", tmp_path / "router", "router", str(model_dir), *shared, *router),
        hosts.running(
            "decode", tmp_path / "decode", "decode", str(model_dir), *shared, *engine, "--host", HOSTS["decode"]
        ),
        hosts.running(
            "prefill", tmp_path / "prefill", "prefill", str(model_dir), *shared, *engine, "--host", HOSTS["prefill"]
        ),
    ):
        logs = [tmp_path / name for name in HOSTS]
        try:
            wait_until(lambda: _curl(hosts, "/ready")[0] == 200, "readiness", START_LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(log.read_text()[-1500:] for log in logs)) from error
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        status, text = _curl(hosts, "/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, text + "".join(log.read_text()[-1500:] for log in logs)
        reference.assert_equal([json.loads(text)["choices"][0]["token_ids"]], [wanted], "three hosts")
        wait_until(
            lambda: "kvferry_kv_transfer_bytes_count 1.0" in _curl(hosts, "/metrics")[1], "the transfer's report"
        )
        for host in ("decode", "prefill"):
            assert _listening(hosts, host) == [HOSTS[host]]  # of all its interfaces
            assert (tmp_path / host).read_text().count('"open_data_plane"') == 1
