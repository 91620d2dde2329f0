"""The children of a launcher: how a router and a worker are called, and what a router reports.

A child is called `PROGRAM --config-json JSON --lifeline-fd N`; a router also `--http-fd N`, a socket that listens.
What is secret comes in its environment: arguments can be read by every user of the machine.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..common.clock import Clock
from ..common.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, CACHE_VARIABLE, FAILPOINTS_VARIABLE, SECRET_VARIABLE
from ..common.router_config import RouterConfig
from ..settings.fields import ENV_PREFIX
from ..wire.address import Address
from .child_process import Command
from .forking import ForkServer
from .plan import WorkerPlan
from .process import Child, ChildState, ChildTimes

# What torch's allocator is told by. Segments that grow are no memory that another process can open by cudaIpc.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_NOT_SHAREABLE = "expandable_segments"
ROUTER_PROGRAM = (sys.executable, "-m", "kvferry.router")
WORKER_PROGRAM = (sys.executable, "-m", "kvferry.worker")
# All that is large. A worker imports torch after it has started its other ranks, thus not with its program.
_IMPORTS = {
    ROUTER_PROGRAM: ("kvferry.router.process",),
    WORKER_PROGRAM: ("kvferry.worker.process", "kvferry.worker.build", "kvferry.worker.worker"),
}
# Requests wait for a worker that comes back, and the routers know from its last life how fast it is.
_RECOVERY_CALIBRATION_S = 0.3


def make_fork_server(env: Mapping[str, str], *, with_workers: bool) -> ForkServer:
    """Make what starts routers, and workers too. Those with GPUs start afresh: CUDA is theirs from the first import."""
    programs = (ROUTER_PROGRAM, WORKER_PROGRAM) if with_workers else (ROUTER_PROGRAM,)
    imports = {program[-1]: _IMPORTS[program] for program in programs}
    return ForkServer(child_environment(env, (), loopback=True), imports)


class RouterChild:
    """A router as a child that keeps its control port over restarts."""

    def __init__(
        self,
        name: str,
        config: RouterConfig,
        env: Mapping[str, str],
        clock: Clock,
        on_event: Callable[[str, dict[str, object]], None],
        *,
        sockets: Callable[[], Mapping[str, socket.socket]],
        program: tuple[str, ...] = ROUTER_PROGRAM,
        times: ChildTimes | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        """`sockets`: by the flag that hands each over, asked for at each start."""
        times = times or ChildTimes()
        times = replace(times, hang_after_s=times.router_hang_after_s)
        self._config = config
        self._env = env
        self._program = program
        self._fork_server = fork_server
        self._sockets = sockets
        self._on_event = on_event
        self._pools: dict[str, object] | None = None  # what it said last, in this life
        self.child = Child(name, self._command, clock, times=times, on_event=self._take)

    @property
    def control(self) -> Address:
        """Return where workers connect. Known once the child was ready."""
        return Address.parse(str(self.child.ready_event["control"]))

    @property
    def lacks(self) -> list[str]:
        """Say why the router is not ready for requests; empty: it is."""
        if self._pools is None:
            return ["it starts"]
        reasons = self._pools["reasons"]
        return [str(reason) for reason in reasons] if isinstance(reasons, list) else []

    @property
    def roles(self) -> Mapping[str, str]:
        """Return the present role of each worker that the router has as ready."""
        roles = (self._pools or {}).get("roles")
        return {str(name): str(role) for name, role in roles.items()} if isinstance(roles, dict) else {}

    @property
    def experts(self) -> Mapping[str, object] | None:
        """Return how evenly the workers' experts are chosen, where any of them has told."""
        experts = (self._pools or {}).get("experts")
        return experts if isinstance(experts, dict) else None

    def sees(self, workers: Sequence[Child]) -> bool:
        """Say whether the router has the present lives of these workers as ready; those that leave do not count."""
        if self._pools is None:
            return False
        pids = self._pools["workers"]
        return isinstance(pids, dict) and all(
            worker.is_retired or (worker.state is ChildState.READY and pids.get(worker.name) == worker.pid)
            for worker in workers
        )

    def _take(self, name: str, event: dict[str, object]) -> None:
        if event["event"] == "pools":
            self._pools = event
        elif event["event"] in ("started", "restart"):
            self._pools = None
        self._on_event(name, event)

    def _command(self) -> Command:
        config = self._config
        if self.child.was_ready.is_set():
            config = config.model_copy(update={"control_port": self.control.port})
        return Command(
            (*self._program, "--config-json", config.model_dump_json()),
            self._env,
            {flag: sock.fileno() for flag, sock in self._sockets().items()},
            self.child.name,
            self._fork_server,
        )


def worker_child(
    worker: WorkerPlan,
    controls: Callable[[], tuple[str, ...]],
    env: Mapping[str, str],
    clock: Clock,
    on_event: Callable[[str, dict[str, object]], None],
    *,
    program: tuple[str, ...] = WORKER_PROGRAM,
    times: ChildTimes | None = None,
    fork_server: ForkServer | None = None,
) -> Child:
    """A worker under supervision. `controls`: the routers' control sockets, all known before it is run."""
    name = worker.config.worker_id

    def command() -> Command:
        update: dict[str, object] = {"routers": controls()}
        if child.is_recovering:
            update["calibration_s"] = min(_RECOVERY_CALIBRATION_S, worker.config.calibration_s)
        config = worker.config.model_copy(update=update)
        argv = (*program, "--config-json", config.model_dump_json())
        own = None if worker.gpus else fork_server
        return Command(argv, worker_environment(env, worker), name=name, fork_server=own)

    child = Child(name, command, clock, times=times, on_event=on_event)
    return child


def child_environment(
    env: Mapping[str, str],
    secrets: tuple[bytes, ...],
    *,
    loopback: bool = False,
    api_keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
) -> dict[str, str]:
    """Return what a child sees: not our settings, as its configuration is complete, but what is secret.

    `secrets`: none where it reads them from a file of its own.
    """
    passed = (CACHE_VARIABLE, FAILPOINTS_VARIABLE)
    kept = {name: value for name, value in env.items() if not name.startswith(ENV_PREFIX) or name in passed}
    if secrets:
        kept[SECRET_VARIABLE] = b"\n".join(secrets).decode()
    if api_keys:
        kept[API_KEY_VARIABLE] = ",".join(api_keys)
    if admin_keys:
        kept[ADMIN_KEY_VARIABLE] = ",".join(admin_keys)
    if loopback:
        kept.setdefault("UCX_NET_DEVICES", "lo")  # else UCX listens on every interface
    return kept


def worker_environment(base: Mapping[str, str], worker: WorkerPlan) -> dict[str, str]:
    """Return what a worker sees. Its GPUs go by the driver's numbers, which CUDA counts by only when it is told to."""
    env = dict(base)
    if worker.config.engine.num_threads is not None:
        env["OMP_NUM_THREADS"] = str(worker.config.engine.num_threads)
    if worker.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(worker.gpus)
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        for name in _ALLOCATOR_VARIABLES:
            options = [option for option in env.pop(name, "").split(",") if option.strip()]
            kept = [option for option in options if option.split(":")[0].strip() != _NOT_SHAREABLE]
            env |= {name: ",".join(kept)} if kept else {}
    return env


def reachable(address: Address) -> Address:
    """Return where this machine reaches a server that listens at `address`."""
    return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host), address.port)
