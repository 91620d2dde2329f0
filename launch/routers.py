"""The routers of one deployment: processes that share one listening socket, each with its own control socket.

    bind once ─> the descriptor goes to every router ─> each accepts from the same queue
    bind one admin port for each router: there an operator asks a certain one

The launcher holds the socket until it is told to end. A router that restarts loses no connection that waits to be
accepted: the others take it, or the next life does. At the end launcher and routers let go of it at once: who comes
then is refused, in place of waiting for an answer that nobody will give. Workers connect to every router, at ports that
each keeps over its restarts. What a router sees of its workers comes over its lifeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Mapping, Sequence

import structlog

from ..common.clock import Clock
from ..common.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from ..common.router_config import RouterConfig
from ..settings.answers_dir import OwnAnswersDir
from ..settings.quota_board import QuotaBoard, has_quotas
from ..settings.sockets import listen
from ..settings.tls import admin_scheme, http_scheme
from ..wire.address import Address
from ..wire.lifeline import Event
from .child_process import within
from .children import ROUTER_PROGRAM, RouterChild
from .forking import ForkServer
from .process import Child, ChildState, ChildTimes
from .progress import Display

_NOTE_EVERY_S = 5.0
_DOWN = {
    ChildState.STARTING: "starts",
    ChildState.WAITING: "has ended, and starts after a pause",
    ChildState.ENDED: "has ended",
}

log = structlog.get_logger(__name__)


class RouterGroup:
    """One router or several. `run` owns the processes and the sockets."""

    def __init__(
        self,
        config: RouterConfig,
        num_routers: int,
        env: Mapping[str, str],
        clock: Clock,
        display: Display,
        *,
        program: tuple[str, ...] = ROUTER_PROGRAM,
        times: ChildTimes | None = None,
        fork_server: ForkServer | None = None,
        on_restart_wanted: Callable[[], None] = lambda: None,
        on_scale_event: Callable[[str, dict[str, object]], None] = lambda name, event: None,
        on_reloaded: Callable[[str, dict[str, object]], None] = lambda name, event: None,
        on_blameless: Callable[[str, object], None] = lambda worker_id, incarnation: None,
    ) -> None:
        """`on_restart_wanted`: an operator asked a router for a rolling restart of all.

        `on_blameless`: this life of a worker ended because of a request.

        `on_scale_event`: a router reports its load, or what the fleet should be like.

        `on_reloaded`: a child, a worker too, has read its files again, or could not.
        """
        self._clock = clock
        self._display = display
        self._config = config
        self._on_restart_wanted = on_restart_wanted
        self._on_scale_event = on_scale_event
        self._on_reloaded = on_reloaded
        self._on_blameless = on_blameless
        self._changed = asyncio.Event()
        self._http: socket.socket | None = None
        self._address: Address | None = None  # of that socket
        self._admin: list[socket.socket] = []  # one for each router, or none
        secrets = {API_KEY_VARIABLE: ",".join(config.api_key), ADMIN_KEY_VARIABLE: ",".join(config.admin_key)}
        env = {**env, **secrets}
        config = config.model_copy(update={"api_key": (), "admin_key": ()})
        self._board: QuotaBoard | None = None  # what keys have used of all routers
        if num_routers > 1 and has_quotas(config):
            self._board = QuotaBoard.create(num_routers)
            config = config.model_copy(update={"quota_board": self._board.path})
        self._answers: OwnAnswersDir | None = None
        if config.answers_dir is None:
            self._answers = _own_answers_dir()
        if self._answers is not None:
            config = config.model_copy(update={"answers_dir": self._answers.path})
        self.routers = [
            RouterChild(
                "router" if num_routers == 1 else f"router-{index}",
                config,
                env,
                clock,
                self.on_event,
                sockets=functools.partial(self._sockets_of, index),
                program=program,
                times=times,
                fork_server=fork_server,
            )
            for index in range(num_routers)
        ]

    @property
    def children(self) -> list[Child]:
        return [router.child for router in self.routers]

    @property
    def is_bound(self) -> bool:
        """The listening socket is there."""
        return self._address is not None

    @property
    def http(self) -> Address:
        assert self._address is not None
        return self._address

    @property
    def url(self) -> str:
        """Return where clients come to, without a path."""
        return f"{http_scheme(self._config)}://{self.http}"

    @property
    def admin_urls(self) -> list[str]:
        """Return where each router's own admin listener is: on the configured port, and those after it."""
        scheme, config = admin_scheme(self._config), self._config
        return [f"{scheme}://{Address(config.admin_host, sock.getsockname()[1])}" for sock in self._admin]

    @property
    def controls(self) -> tuple[str, ...]:
        """Return where workers connect. Known once every router was ready."""
        return tuple(str(router.control) for router in self.routers)

    async def run(self) -> None:
        """Keep the routers running until cancelled; then the processes are gone."""
        config = self._config
        with contextlib.ExitStack() as stack:
            self._http = stack.enter_context(listen(Address(config.host, config.port)))
            self._address = Address(config.host, self._http.getsockname()[1])
            for shared in (self._board, self._answers):
                if shared is not None:
                    stack.callback(shared.close)
            for index in range(len(self.routers) if config.admin_port is not None else 0):
                address = Address(config.admin_host, config.admin_port + index if config.admin_port else 0)
                self._admin.append(stack.enter_context(listen(address, setting="admin_port")))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_held(self._http))
                for child in self.children:
                    tasks.create_task(child.run())

    def _sockets_of(self, index: int) -> dict[str, socket.socket]:
        """Return a router's sockets by the flag that hands each over."""
        assert self._http is not None
        own = {"--admin-fd": self._admin[index]} if self._admin else {}
        return {"--http-fd": self._http, **own}

    async def wait_until_up(self) -> None:
        """Every router runs; `controls` are known."""
        for child in self.children:
            await child.was_ready.wait()

    async def wait_until_serving(self) -> None:
        """Every router is ready for requests; tells now and then what it waits for."""
        while True:
            waiting = asyncio.ensure_future(self._until(lambda: not any(router.lacks for router in self.routers)))
            done, _ = await asyncio.wait((waiting,), timeout=_NOTE_EVERY_S)
            waiting.cancel()
            if done:
                return
            for router in self.routers:
                if router.lacks:
                    self._display.note(f"{router.child.name}: waiting: {'; '.join(router.lacks)}")

    async def wait_until_whole(
        self, workers: Sequence[Child], limit_s: float, tell: Callable[[str], None], *, but: str | None = None
    ) -> str:
        """Wait until every router runs and has the present life of every worker as ready, for so long at most.

        Returns what is missing after all; empty: nothing. Tells now and then what it waits for. `but`: a process that
        may be missing.
        """
        until_s = self._clock.now() + limit_s
        while missing := self._missing(workers, but):
            left_s = until_s - self._clock.now()
            if left_s <= 0:
                break
            if not await within(min(left_s, _NOTE_EVERY_S), self._until(lambda: not self._missing(workers, but))):
                tell(missing)
        return missing

    def _missing(self, workers: Sequence[Child], but: str | None) -> str:
        routers = [router for router in self.routers if router.child.name != but]
        there = [worker for worker in workers if worker.name != but and not worker.is_retired]
        children = [*there, *(router.child for router in routers)]
        words = [f"{child.name} {_DOWN[child.state]}" for child in children if child.state in _DOWN]
        for router in routers if not words else ():
            words += [f"{router.child.name} does not see {each.name}" for each in there if not router.sees([each])]
        return "; ".join(words)

    @property
    def leader(self) -> Child | None:
        """The one that decides about the fleet: the first that runs."""
        return next((child for child in self.children if child.state is ChildState.READY), None)

    def roles_now(self, roles: Mapping[str, str]) -> dict[str, str]:
        """Return the present role of each of these workers: routers change them. `roles`: those that they began in."""
        seen = next((router.roles for router in self.routers if router.roles), {})
        return {name: seen.get(name, role) for name, role in roles.items()}

    @property
    def experts(self) -> Mapping[str, object] | None:
        """Return how evenly experts are chosen, as the first router says that knows; None: the model has none."""
        return next((router.experts for router in self.routers if router.experts is not None), None)

    def tell(self, event: Event, *, to: Child | None = None) -> None:
        """Say something to every router that runs, or to this one."""
        for child in self.children if to is None else (to,):
            child.send(event)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def on_event(self, name: str, event: dict[str, object]) -> None:
        """Take what a child reports, workers too: it may be what somebody waits for."""
        match event["event"]:
            case "restart_all":
                self._on_restart_wanted()
            case "scale" | "hold" | "load":
                self._on_scale_event(name, event)
                return
            case "reloaded":
                self._on_reloaded(name, event)
            case "blameless":
                self._on_blameless(str(event.get("worker_id")), event.get("incarnation"))
            case "pools":
                pass
            case _:
                self._display.on_event(name, event)
        if event["event"] in ("ready", "restart") and any(child.name == name for child in self.children):
            self._on_scale_event(name, event)
        self._changed.set()


def _own_answers_dir() -> OwnAnswersDir | None:
    """Return None where there is no place for it: then no answer is kept."""
    try:
        return OwnAnswersDir()
    except OSError as error:
        log.warning("answers_not_kept", reason=f"{error.strerror or error}", hint="--answers-dir")
        return None


async def _held(sock: socket.socket) -> None:
    """Keep a socket open until cancelled, as the children are, which may take long to end."""
    with sock:
        await asyncio.Event().wait()
