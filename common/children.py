"""The children of a launcher: how router and workers are called, and the router's addresses.

A child is called `PROGRAM --config-json JSON --lifeline-fd N`. What is secret comes in its environment: arguments can
be read by every user of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

from .channel import Address
from .clock import Clock
from .config import API_KEY_VARIABLE, CACHE_VARIABLE, SECRET_VARIABLE, RouterConfig
from .options import ENV_PREFIX
from .plan import WorkerPlan
from .process import Child, ChildTimes, Command
from .progress import Display

ROUTER_PROGRAM = (sys.executable, "-m", "kvferry.router")
WORKER_PROGRAM = (sys.executable, "-m", "kvferry.worker")

_READY_POLL_S = 0.2
_READY_TIMEOUT_S = 2.0
_POLLS_PER_NOTE = 25


class RouterChild:
    """The router as a child that keeps its ports over restarts."""

    def __init__(
        self,
        config: RouterConfig,
        env: Mapping[str, str],
        clock: Clock,
        display: Display,
        *,
        program: tuple[str, ...] = ROUTER_PROGRAM,
        times: ChildTimes | None = None,
    ) -> None:
        self._config = config.model_copy(update={"api_keys": ()})
        self._env = {**env, API_KEY_VARIABLE: ",".join(config.api_keys)}
        self._program = program
        self._display = display
        self.child = Child("router", self._command, clock, times=times, on_event=display.on_event)

    @property
    def http(self) -> Address:
        return Address.parse(str(self.child.ready_event["http"]))

    @property
    def control(self) -> Address:
        """Where workers connect. Known once the child was ready."""
        return Address.parse(str(self.child.ready_event["control"]))

    def _command(self) -> Command:
        config = self._config
        if self.child.was_ready.is_set():
            config = config.model_copy(update={"port": self.http.port, "control_port": self.control.port})
        return Command((*self._program, "--config-json", config.model_dump_json()), self._env)

    async def wait_until_serving(self) -> None:
        """Returns once /ready answers 200; tells now and then what it waits for."""
        url = f"http://{reachable(self.http)}/ready"
        num_polls = 0
        while (reasons := await asyncio.to_thread(_not_ready, url)) is not None:
            num_polls += 1
            if num_polls % _POLLS_PER_NOTE == 0:
                self._display.note(f"router: waiting: {reasons}")
            await asyncio.sleep(_READY_POLL_S)


def worker_child(
    worker: WorkerPlan,
    router: RouterChild,
    env: Mapping[str, str],
    clock: Clock,
    display: Display,
    *,
    program: tuple[str, ...] = WORKER_PROGRAM,
    times: ChildTimes | None = None,
) -> Child:
    """A worker under supervision; `router` was ready before it is run."""

    def command() -> Command:
        config = worker.config.model_copy(update={"routers": (str(router.control),)})
        return Command((*program, "--config-json", config.model_dump_json()), worker_environment(env, worker))

    return Child(worker.config.worker_id, command, clock, times=times, on_event=display.on_event)


def child_environment(
    env: Mapping[str, str], secret: bytes, *, loopback: bool, api_keys: tuple[str, ...] = ()
) -> dict[str, str]:
    """What a child sees: not our settings, as its configuration is complete, but what is secret."""
    kept = {name: value for name, value in env.items() if not name.startswith(ENV_PREFIX) or name == CACHE_VARIABLE}
    kept[SECRET_VARIABLE] = secret.decode()
    if api_keys:
        kept[API_KEY_VARIABLE] = ",".join(api_keys)
    if loopback:
        kept.setdefault("UCX_NET_DEVICES", "lo")  # else UCX listens on every interface
    return kept


def worker_environment(base: Mapping[str, str], worker: WorkerPlan) -> dict[str, str]:
    env = dict(base)
    if worker.config.engine.num_threads is not None:
        env["OMP_NUM_THREADS"] = str(worker.config.engine.num_threads)
    if worker.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(worker.gpus)
    return env


def reachable(address: Address) -> Address:
    """Where this machine reaches a server that listens at `address`."""
    return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host), address.port)


def _not_ready(url: str) -> str | None:
    """Why a router is not ready; None if it is."""
    try:
        with urllib.request.urlopen(url, timeout=_READY_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            body = error.read(4096)
    except OSError as error:
        return str(error)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return "; ".join(str(reason) for reason in json.loads(body)["reasons"])
    return "not ready"
