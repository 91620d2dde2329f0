"""The router process: HTTP for clients and the control socket for workers, on one event loop.

    bind, load the tokenizer -> control socket -> HTTP -> ready, beats
    SIGTERM  -> no new connection; what runs gets `drain_timeout`, then an error event -> 0
    SIGINT   -> the same with a few seconds; a second signal: the error event at once

What cannot work is found before anything listens: a ConfigError with one line that names the setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
from fastapi import FastAPI

from .. import __version__
from ..common.channel import Address, max_frame_bytes
from ..common.clock import Clock, SystemClock, wall_time_us, week_s
from ..common.config import RouterConfig
from ..common.credentials import SharedSecret
from ..common.errors import ConfigError
from ..common.sockets import listen
from ..models.config import ModelConfig
from ..models.tokenizer import Tokenizer
from ..settings.exposure import check_exposure
from ..settings.open_files import MAX_CONNECTIONS, room_for_connections
from .access.credentials import RouterCredentials
from .access.keys import ApiKeys
from .access.quota import QuotaLimits
from .access.reload import reloading
from .admin.admin import Admin, build_admin
from .admin.scaling import scaling_routes
from .api.app import build_app
from .api.defaults import SamplingDefaults
from .api.generation import Api
from .api.prompts import ServedModel
from .autoscaler.load_record import LoadRecord, RecordingMetrics
from .autoscaler.scaling import Scaling
from .dispatch.control import ControlServer, Expected
from .dispatch.dispatcher import Dispatcher
from .http.connection_limits import Connections
from .http.http_server import HttpServer
from .metrics.metrics import RouterMetrics
from .placement import make_policy
from .pulse import Pulse
from .shutdown import Stop, wind_down
from .state.classes import RequestClasses
from .state.failures import WorkerLife
from .state.objectives import DEFAULT_CLASS
from .state.predictor import Predictor

REPORT_EVERY_S = 0.1
_SCALE_TICK_S = 0.25
# Objects more than before, young collections, middle ones: until the next collection of each kind. Python's own are
# 700, 10, 10. A finished request leaves nothing to collect; what lives should not be gone through often, nor for long.
_GC_THRESHOLDS = (10_000, 4, 50)

log = structlog.get_logger(__name__)


class Reporter(Protocol):
    """The launcher's end of the lifeline, as far as the router needs it."""

    def ready(self, **details: object) -> None: ...

    def beat_with(self, lag_s: Callable[[], float]) -> None: ...

    def send(self, event: Mapping[str, object]) -> None: ...

    def listen(self, on_event: Callable[[dict[str, object]], None]) -> None: ...


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """The model, as the router reads it from its directory."""

    model: ServedModel
    tokenizer: Tokenizer

    @classmethod
    def from_config(cls, config: RouterConfig) -> LoadedModel:
        model_config = ModelConfig.from_dir(config.model_dir)
        tokenizer = Tokenizer.from_dir(config.model_dir, config.chat_template)
        model = ServedModel(
            name=config.served_model_name,
            max_model_len=config.max_model_len or model_config.max_model_len,
            vocab_size=model_config.vocab_size,
            defaults=SamplingDefaults.from_dir(config.model_dir),
            deterministic=config.deterministic,
            special_tokens=config.special_tokens_in_messages,
        )
        return cls(model, tokenizer)


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
        loaded = await asyncio.to_thread(LoadedModel.from_config, config)
        clock = SystemClock()
        record, classes = LoadRecord(), RequestClasses.from_config(config)
        metrics = RecordingMetrics(config.served_model_name, record, classes.names)
        predictor = Predictor()
        policy = make_policy(config, predictor)
        dispatcher = Dispatcher(
            config,
            policy,
            clock,
            metrics,
            time_us=wall_time_us,
            predictor=predictor,
            on_blameless=partial(_tell_blameless, lifeline),
        )
        scaling = _scaling(config, classes, dispatcher, predictor, record, clock, lifeline)
        metrics.replicas = scaling.replicas
        app = _application(config, loaded, dispatcher, metrics, clock, credentials.clients)
        control = _control(config, loaded.model, dispatcher, credentials.secret, metrics)
        app.state.api.prompts.start()
        control_address = await _start_control(control, Address(config.control_host, config.control_port))
        try:
            async with contextlib.AsyncExitStack() as serving:
                stop = serving.enter_context(Stop(config.drain_timeout).listening())
                serving.enter_context(reloading(credentials, lifeline, scaling.on_launcher))
                books = Connections(room, config.max_connections_per_address, metrics)
                front = await serving.enter_async_context(HttpServer(app, books=books).serving(sock))
                if admin_socket is not None:
                    render = partial(_render, app.state.api, metrics)
                    admin = build_admin(
                        Admin(dispatcher, render, config.drain_timeout, lifeline),
                        credentials.operators,
                        scaling_routes(scaling),
                    )
                    await serving.enter_async_context(HttpServer(admin).serving(admin_socket))
                address = Address(config.host, sock.getsockname()[1])
                on_ready()
                log.info("router_ready", http=str(address), control=str(control_address))
                reports = asyncio.create_task(_report(lifeline, dispatcher, metrics, clock, address, control_address))
                serving.callback(reports.cancel)
                scales = asyncio.create_task(_scale(scaling))
                serving.callback(scales.cancel)
                await _until_stopped(stop, control)
                await wind_down(front, dispatcher, app.state.api.in_flight, stop)
        finally:
            await control.close()
            app.state.api.close()
    return 0


def collect_rarely() -> None:
    """Tune garbage collection for a process that is a router: what is loaded stays, so that a collection need not go
    through it, nor hold up a burst of tokens."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _until_stopped(stop: Stop, control: ControlServer) -> None:
    """Returns on a signal. Raises what ended the control server."""
    waits = [asyncio.create_task(stop.asked.wait()), asyncio.create_task(control.wait())]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in waits:
            task.cancel()


def _tell_blameless(lifeline: Reporter | None, life: WorkerLife) -> None:
    if lifeline is not None:
        worker_id, incarnation = life
        lifeline.send({"event": "blameless", "worker_id": worker_id, "incarnation": incarnation})


async def _report(
    lifeline: Reporter | None,
    dispatcher: Dispatcher,
    metrics: RouterMetrics,
    clock: Clock,
    http: Address,
    control: Address,
) -> None:
    """Report that the event loop moves, how late it is, and who is ready whenever that changes."""
    pulse = Pulse(clock)
    if lifeline is not None:
        lifeline.ready(http=str(http), control=str(control))
        lifeline.beat_with(pulse.lag_s)
    reported: object = None
    while True:
        pulse.moved()
        due_s = clock.now() + REPORT_EVERY_S
        ready = {worker.worker_id: worker.hello.pid for worker in dispatcher.view().workers if worker.is_ready}
        pools = {"event": "pools", "reasons": dispatcher.ready(), "workers": ready}
        if lifeline is not None and pools != reported:
            lifeline.send(pools)
            reported = pools
        await asyncio.sleep(due_s - clock.now())
        metrics.on_loop_lag(max(0.0, clock.now() - due_s))


def _scaling(
    config: RouterConfig,
    classes: RequestClasses,
    dispatcher: Dispatcher,
    predictor: Predictor,
    record: LoadRecord,
    clock: Clock,
    lifeline: Reporter | None,
) -> Scaling:
    """Make what scales the fleet: its decisions go to the launcher, if there is one."""
    return Scaling(
        config.autoscale,
        classes.named(DEFAULT_CLASS),
        dispatcher,
        predictor,
        record,
        clock,
        week_s,
        launcher=lifeline.send if lifeline is not None else None,
    )


async def _scale(scaling: Scaling) -> None:
    while True:
        await asyncio.sleep(_SCALE_TICK_S)
        scaling.tick()


def _render(api: Api, metrics: RouterMetrics) -> tuple[bytes, str]:
    return metrics.render(api.backend.view(), num_in_flight=len(api.in_flight))


def _application(
    config: RouterConfig,
    loaded: LoadedModel,
    dispatcher: Dispatcher,
    metrics: RouterMetrics,
    clock: Clock,
    keys: ApiKeys,
) -> FastAPI:
    return build_app(
        loaded.model,
        dispatcher,
        loaded.tokenizer,
        metrics,
        keys=keys,
        clock=clock,
        seed=config.seed,
        quota=QuotaLimits(
            config.max_concurrency_per_key,
            config.requests_per_minute_per_key,
            config.tokens_per_minute_per_key,
        ),
        share_prefix_cache=config.share_prefix_cache,
        classes=RequestClasses.from_config(config),
        allowed_hosts=(config.host, *config.allowed_hosts) if not config.needs_api_keys else config.allowed_hosts,
        allowed_origins=config.allowed_origins,
    )


def _control(
    config: RouterConfig, model: ServedModel, dispatcher: Dispatcher, secret: SharedSecret, metrics: RouterMetrics
) -> ControlServer:
    return ControlServer(
        dispatcher,
        Expected(
            version=__version__,
            model=config.served_model_name,
            max_model_len=config.max_model_len,
            deterministic=config.deterministic,
        ),
        router_id=f"router-{uuid.uuid4().hex[:12]}",
        frame_bytes=max_frame_bytes(model.max_model_len),
        secret=secret,
        count_refusal=metrics.on_handshake_refused,
    )


async def _start_control(control: ControlServer, address: Address) -> Address:
    try:
        return await control.start(address)
    except OSError as error:
        raise ConfigError(f"control_port: cannot listen on {address}: {error.strerror or error}") from error
