"""The systems that are measured, each as a context manager that yields it running on this machine's loopback.

    kvferry-pd     `kvferry serve`, one prefill and one decode worker, settings as shipped
    kvferry-co     `kvferry serve --prefill 0`, one worker does both
    vllm-agg       vLLM for CPU, one server on all cores
    vllm-pd        vLLM for CPU with its NIXL connector: a prefill and a decode server, each on half of the cores
    vllm-pd-shared the same, each of the two servers with a thread on every core

vLLM is tuned: its NIXL progress thread sleeps between rounds, and its workers are put back on their cores after its
connector has moved them all to the last one. Prefix caching is off there, since no prompt comes twice.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvferry.benchmarks.peers.vllm_install import PROGRESS_DELAY_VARIABLE, VLLM_VERSION
from kvferry.benchmarks.shared.program import names_of
from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import process_tree, processes
from kvferry.tools.load.server_process import ServerProcess, free_port, running

_START_TIMEOUT_S = 600.0  # vLLM compiles on its first start
_PROGRESS_DELAY_US = 1000
ADAPTER_RANK = 16


@dataclass(slots=True, frozen=True)
class Setup:
    """What the systems are started with."""

    model_dir: Path
    log_dir: Path
    peer_venv: Path
    cores: tuple[int, ...]  # the whole measurement, client included, stays on these
    max_model_len: int = 8192
    vllm_kv_gib: int = 2  # KV cache of each vLLM server; kvferry's is a flag
    vllm_dtype: str = "bfloat16"  # float32 is faster there on a processor without products of bfloat16
    kvferry_flags: tuple[str, ...] = ()
    adapters: tuple[Path, ...] = ()  # served by their folders' names, as many in one batch
    vllm_env: Mapping[str, str] = field(default_factory=dict)  # more of it

    @property
    def adapter_flags(self) -> list[str]:
        """Flags that have the same names and meaning on both sides."""
        if not self.adapters:
            return []
        modules = [f"{path.name}={path}" for path in self.adapters]
        most = str(len(self.adapters))
        return ["--enable-lora", "--max-loras", most, "--max-lora-rank", str(ADAPTER_RANK), "--lora-modules", *modules]

    @property
    def served_name(self) -> str:
        return self.model_dir.name


@dataclass(slots=True, frozen=True)
class RunningSystem:
    """A system that answers."""

    base_url: str
    model: str
    pids: tuple[int, ...]  # roots of its processes
    about: str  # version and settings that matter


StartSystem = Callable[[Setup], AbstractContextManager[RunningSystem]]


@contextmanager
def kvferry_disaggregated(setup: Setup) -> Iterator[RunningSystem]:
    with _kvferry("kvferry-pd", setup, ()) as system:
        yield system


@contextmanager
def kvferry_colocated(setup: Setup) -> Iterator[RunningSystem]:
    with _kvferry("kvferry-co", setup, ("--prefill", "0", "--decode", "1")) as system:
        yield system


@contextmanager
def _kvferry(name: str, setup: Setup, flags: Sequence[str]) -> Iterator[RunningSystem]:
    port = free_port()
    command = [sys.executable, "-m", "kvferry", "serve", str(setup.model_dir), *flags, *setup.kvferry_flags]
    command += setup.adapter_flags
    command += ["--served-model-name", setup.served_name, "--host", "127.0.0.1", "--port", str(port)]
    with running(name, command, setup.log_dir) as process:
        process.wait_until_healthy(f"http://127.0.0.1:{port}/health", _START_TIMEOUT_S)
        about = " ".join(["kvferry serve", *flags, *setup.kvferry_flags])
        yield RunningSystem(f"http://127.0.0.1:{port}", setup.served_name, (process.pid,), about)


@contextmanager
def vllm_aggregated(setup: Setup) -> Iterator[RunningSystem]:
    with _vllm("vllm-agg", setup, setup.cores) as (process, url):
        process.wait_until_healthy(f"{url}/health", _START_TIMEOUT_S)
        about = f"vLLM {VLLM_VERSION}, {setup.vllm_dtype}, one server, {len(setup.cores)} threads"
        yield RunningSystem(url, setup.served_name, (process.pid,), about)


@contextmanager
def vllm_disaggregated(setup: Setup) -> Iterator[RunningSystem]:
    if len(setup.cores) < 2:
        raise ConfigError(f"vllm-pd needs a core for each of its two servers, got cores {setup.cores}")
    half = len(setup.cores) // 2
    with _vllm_split(setup, setup.cores[:half], setup.cores[half:]) as system:
        yield system


@contextmanager
def vllm_disaggregated_shared(setup: Setup) -> Iterator[RunningSystem]:
    with _vllm_split(setup, setup.cores, setup.cores) as system:
        yield system


@contextmanager
def _vllm_split(setup: Setup, prefill_cores: Sequence[int], decode_cores: Sequence[int]) -> Iterator[RunningSystem]:
    with (
        _vllm("vllm-pd-prefill", setup, prefill_cores, kv_role="kv_producer") as (prefill, prefill_url),
        _vllm("vllm-pd-decode", setup, decode_cores, kv_role="kv_consumer") as (decode, decode_url),
        _proxy(setup, prefill_url, decode_url) as (proxy, proxy_url),
    ):
        prefill.wait_until_healthy(f"{prefill_url}/health", _START_TIMEOUT_S)
        decode.wait_until_healthy(f"{decode_url}/health", _START_TIMEOUT_S)
        proxy.wait_until_healthy(f"{proxy_url}/health", _START_TIMEOUT_S)
        _put_worker_on_cores(prefill, prefill_cores)
        _put_worker_on_cores(decode, decode_cores)
        threads = f"{len(prefill_cores)} + {len(decode_cores)} threads"
        about = f"vLLM {VLLM_VERSION}, {setup.vllm_dtype}, NIXL connector, {threads}, tuned"
        yield RunningSystem(proxy_url, setup.served_name, (prefill.pid, decode.pid, proxy.pid), about)


SYSTEMS: dict[str, StartSystem] = {
    "kvferry-pd": kvferry_disaggregated,
    "kvferry-co": kvferry_colocated,
    "vllm-agg": vllm_aggregated,
    "vllm-pd": vllm_disaggregated,
    "vllm-pd-shared": vllm_disaggregated_shared,
}
VLLM_DTYPES = ("bfloat16", "float32")
DEFAULT_SYSTEMS = ("kvferry-pd", "kvferry-co", "vllm-agg", "vllm-pd")


system_names = names_of(SYSTEMS)  # the value of `--systems`


@contextmanager
def _vllm(
    name: str, setup: Setup, cores: Sequence[int], kv_role: str | None = None
) -> Iterator[tuple[ServerProcess, str]]:
    port = free_port()
    command = [str(setup.peer_venv / "bin" / "vllm"), "serve", str(setup.model_dir)]
    command += ["--served-model-name", setup.served_name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", setup.vllm_dtype, "--max-model-len", str(setup.max_model_len), "--max-num-seqs", "16"]
    command += ["--no-enable-prefix-caching", *setup.adapter_flags]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(setup.vllm_kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "LD_PRELOAD": ":".join(_preloads(setup.peer_venv)),
        "PYTHONPATH": "",  # its packages are its own
        **setup.vllm_env,
    }
    if kv_role is not None:
        connector = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
        command += ["--kv-transfer-config", json.dumps(connector)]
        env |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "UCX_TLS": "tcp,sm,self",
            "UCX_NET_DEVICES": "lo",
            PROGRESS_DELAY_VARIABLE: str(_PROGRESS_DELAY_US),
        }
    with running(name, command, setup.log_dir, env) as process:
        yield process, f"http://127.0.0.1:{port}"


@contextmanager
def _proxy(setup: Setup, prefill_url: str, decode_url: str) -> Iterator[tuple[ServerProcess, str]]:
    port = free_port()
    command = [sys.executable, "-m", "kvferry.benchmarks.peers.vllm_proxy", "--port", str(port)]
    command += ["--prefill", prefill_url, "--decode", decode_url]
    with running("vllm-pd-proxy", command, setup.log_dir) as process:
        yield process, f"http://127.0.0.1:{port}"


def _preloads(peer_venv: Path) -> list[str]:
    """vLLM's own advice for CPUs: its OpenMP, and tcmalloc where the system has it."""
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return [*([tcmalloc] if tcmalloc else []), str(peer_venv / "lib" / "libiomp5.so")]


def _put_worker_on_cores(server: ServerProcess, cores: Iterable[int]) -> None:
    """vLLM's NIXL connector moves every worker's main thread, which computes, to the machine's last core."""
    workers = [
        process for process in process_tree([server.pid], processes()) if process.name.startswith("VLLM::Worker")
    ]
    if not workers:
        raise ConfigError(f"{server.name}: no process named VLLM::Worker to put on cores {list(cores)}")
    for worker in workers:
        os.sched_setaffinity(worker.pid, cores)
