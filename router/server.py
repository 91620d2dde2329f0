"""The router process: HTTP for clients and the control socket for workers, on one event loop.

    bind, load the models' tokenizers -> control socket -> HTTP -> ready, beats
    SIGTERM  -> no new connection; what runs gets `drain_timeout`, then an error event -> 0
    SIGINT   -> the same with a few seconds; a second signal: the error event at once

What cannot work is found before anything listens: a ConfigError with one line that names the setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Callable
from typing import Protocol

import structlog
from starlette.types import ASGIApp

from ..common.clock import OwnTime
from ..common.errors import ConfigError
from ..common.router_config import RouterConfig
from ..settings.exposure import check_exposure
from ..settings.open_files import MAX_CONNECTIONS, room_for_connections
from ..settings.sockets import listen
from ..settings.tls import has_admin_tls
from ..wire.address import Address
from ..wire.credentials import SharedSecret
from ..wire.frames import max_frame_bytes
from .access.credentials import RouterCredentials
from .access.keys import ApiKeys
from .access.reload import ReloadLauncher, reloading
from .admin.adapters import adapter_routes
from .admin.admin import Admin, build_admin
from .admin.scaling import scaling_routes
from .assembly import RouterParts, assemble
from .autoscaler.scaling import Scaling
from .dispatch.control import ControlServer
from .http.connection_limits import Connections
from .http.http_server import HttpServer
from .pulse import Pulse
from .shutdown import Stop, first_of, wind_down
from .state.expert_load import most_uneven

REPORT_EVERY_S = 0.1
_ADMIN_CONNECTIONS = 64  # of the files that a router has beside its clients' (settings/open_files.py)
_SCALE_TICK_S = 0.25

log = structlog.get_logger(__name__)


class Reporter(ReloadLauncher, Protocol):
    """The launcher's end of the lifeline, as far as the router needs it."""

    def ready(self, **details: object) -> None: ...

    def beat_with(self, lag_s: Callable[[], float]) -> None: ...


async def serve_router(
    config: RouterConfig,
    credentials: RouterCredentials,
    lifeline: Reporter | None,
    *,
    http_socket: socket.socket | None = None,
    admin_socket: socket.socket | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal; returns the exit code. Raises ConfigError for what cannot work.

    `on_ready` is called when all is loaded, before that is told.

    The sockets listen already, where a launcher shares them between routers; else they are made here.
    """
    check_exposure(config, has_secret=bool(credentials.secret))
    room = room_for_connections(config.max_connections)
    if room < (config.max_connections or MAX_CONNECTIONS):
        log.warning("open_files_limit", max_connections=room, usual=MAX_CONNECTIONS)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(http_socket or listen(Address(config.host, config.port)))
        if admin_socket is None and config.admin_port is not None:
            admin_socket = listen(Address(config.admin_host, config.admin_port), setting="admin_port")
        if admin_socket is not None:
            stack.enter_context(admin_socket)
        parts = await assemble(config, credentials.clients, lifeline)
        parts.catalogue.start()
        control = _control(parts, credentials.secret)
        control_address = await _start_control(control, Address(config.control_host, config.control_port))
        try:
            async with contextlib.AsyncExitStack() as serving:
                stop = serving.enter_context(Stop(config.drain_timeout).listening())
                serving.enter_context(reloading(credentials, lifeline, parts.scaling.on_launcher))
                books = Connections(room, config.max_connections_per_address, parts.metrics)
                front = await serving.enter_async_context(
                    HttpServer(parts.app, books=books, certificates=credentials.tls).serving(sock)
                )
                if admin_socket is not None:
                    admin = _admin(config, parts, credentials.operators, lifeline, stop.asked.is_set)
                    own = Connections(_ADMIN_CONNECTIONS, _ADMIN_CONNECTIONS)
                    certificates = credentials.tls if has_admin_tls(config) else None
                    await serving.enter_async_context(
                        HttpServer(admin, books=own, certificates=certificates).serving(admin_socket)
                    )
                address = Address(config.host, sock.getsockname()[1])
                on_ready()
                log.info("router_ready", http=str(address), control=str(control_address))
                reports = asyncio.create_task(_report(lifeline, parts, address, control_address))
                serving.callback(reports.cancel)
                scales = asyncio.create_task(_scale(parts.scaling))
                serving.callback(scales.cancel)
                async with (
                    parts.app.background.keeping(),
                    parts.app.keeper.keeping() if parts.app.keeper is not None else contextlib.nullcontext(),
                ):
                    await _until_stopped(stop, control)  # batches and background responses go on with the next router
                await wind_down(front, parts.catalogue, parts.app.api.in_flight, stop)
        finally:
            await control.close()
            parts.app.api.close()
    return 0


async def _until_stopped(stop: Stop, control: ControlServer) -> None:
    """Returns on a signal. Raises what ended the control server."""
    for task in await first_of(stop.asked.wait(), control.wait()):
        task.result()


async def _report(lifeline: Reporter | None, parts: RouterParts, http: Address, control: Address) -> None:
    """Report that the event loop moves, how late it is, and, whenever that changes, who is ready in which
    role and how evenly experts are chosen."""
    catalogue, clock = parts.catalogue, parts.clock
    pulse = Pulse(OwnTime(clock))
    if lifeline is not None:
        lifeline.ready(http=str(http), control=str(control))
        lifeline.beat_with(pulse.lag_s)
    reported: object = None
    while True:
        pulse.moved()
        due_s = clock.now() + REPORT_EVERY_S
        workers = [worker for _, view in catalogue.views() for worker in view.workers]
        pools = {
            "event": "pools",
            "reasons": catalogue.ready(),
            "workers": {worker.worker_id: worker.hello.pid for worker in workers if worker.is_ready},
            "roles": {worker.worker_id: worker.role for worker in workers if worker.is_ready},
            "experts": most_uneven(worker.expert_load for worker in workers),
        }
        if lifeline is not None and pools != reported:
            lifeline.send(pools)
            reported = pools
        await asyncio.sleep(due_s - clock.now())
        parts.metrics.on_loop_lag(max(0.0, clock.now() - due_s))


async def _scale(scaling: Scaling) -> None:
    while True:
        await asyncio.sleep(_SCALE_TICK_S)
        scaling.tick()


def _admin(
    config: RouterConfig, parts: RouterParts, keys: ApiKeys, lifeline: Reporter | None, is_leaving: Callable[[], bool]
) -> ASGIApp:
    dispatchers = [version.dispatcher for version in parts.catalogue]
    scaling = scaling_routes(parts.scaling, is_leaving)
    return build_admin(
        Admin(dispatchers, parts.scrape, config.drain_timeout, lifeline, is_leaving),
        keys,
        [*scaling, *(adapter_routes(parts.adapters) if parts.adapters is not None else ())],
    )


def _control(parts: RouterParts, secret: SharedSecret) -> ControlServer:
    return ControlServer(
        parts.catalogue,
        router_id=f"router-{uuid.uuid4().hex[:12]}",
        frame_bytes=max_frame_bytes(parts.catalogue.max_model_len),
        secret=secret,
        count_refusal=parts.metrics.on_handshake_refused,
    )


async def _start_control(control: ControlServer, address: Address) -> Address:
    try:
        return await control.start(address)
    except OSError as error:
        raise ConfigError(f"control_port: cannot listen on {address}: {error.strerror or error}") from error
