"""The router process: HTTP for clients and the control socket for workers, on one event loop.

    bind, load the tokenizer -> control socket -> HTTP -> ready, beats
    SIGTERM or SIGINT        -> nothing new is accepted; what runs gets GRACE_S, then an error event -> 0

What cannot work is found before anything listens: a ConfigError with one line that names the setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog
import uvicorn
from fastapi import FastAPI

from .. import __version__
from ..common.channel import Address
from ..common.clock import Clock, SystemClock
from ..common.config import RouterConfig
from ..common.errors import ConfigError
from ..common.metrics import RouterMetrics
from ..common.models.config import ModelConfig
from ..common.session import max_frame_bytes
from ..common.tokenizer import Tokenizer
from .app import build_app
from .control import ControlServer, Expected
from .defaults import SamplingDefaults
from .dispatcher import Dispatcher
from .policy import LeastLoaded
from .prompts import ServedModel
from .protocol import DeadlineProtocol
from .reply import InFlight

BEAT_EVERY_S = 0.5
GRACE_S = 5.0  # for running answers after SIGTERM
KEEP_ALIVE_S = 75
_FLUSH_S = 2  # for the last bytes of the last answers
_SEND_BUFFER_BYTES = 128 * 2**10  # in the kernel for each connection: a client that does not read is noticed
_BACKLOG = 2048

log = structlog.get_logger(__name__)


class Reporter(Protocol):
    """The launcher's end of the lifeline, as far as the router needs it."""

    def ready(self, **details: object) -> None: ...

    def beat(self) -> None: ...


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """What the router reads from the model's directory."""

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
        )
        return cls(model, tokenizer)


async def serve_router(config: RouterConfig, secret: bytes, lifeline: Reporter | None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises ConfigError for what cannot work."""
    check_exposure(config, secret)
    with contextlib.closing(listen(Address(config.host, config.port))) as sock:
        loaded = await asyncio.to_thread(LoadedModel.from_config, config)
        clock = SystemClock()
        metrics = RouterMetrics(config.served_model_name)
        dispatcher = Dispatcher(config, _policy(config), clock, metrics)
        app = _application(config, loaded, dispatcher, metrics, clock)
        control = _control(config, loaded.model, dispatcher, secret)
        control_address = await _start_control(control, Address(config.control_host, config.control_port))
        http_address = Address(config.host, sock.getsockname()[1])
        http = HttpServer(app)
        with _stop_signals() as stop:
            try:
                async with http.serving(sock):
                    log.info("router_ready", http=str(http_address), control=str(control_address))
                    beats = asyncio.create_task(_report(lifeline, http_address, control_address))
                    try:
                        await _until_stopped(stop, control)
                        await _wind_down(http, dispatcher, app.state.api.in_flight)
                    finally:
                        beats.cancel()
            finally:
                await control.close()
                app.state.api.prompts.close()
    return 0


def check_exposure(config: RouterConfig, secret: bytes) -> None:
    """Beyond this machine only with credentials."""
    if not config.api_keys and not Address(config.host, config.port).is_loopback:
        raise ConfigError(
            f"host: {config.host} is reachable from other machines and no API key is set; "
            "set --api-key (or KVFERRY_API_KEY), or listen on 127.0.0.1"
        )
    if not secret and not Address(config.control_host, 0).is_loopback:
        raise ConfigError(
            f"control_host: {config.control_host} is reachable from other machines and no secret is set; "
            "set --secret-file (or KVFERRY_SECRET), or listen on 127.0.0.1"
        )


def listen(address: Address) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted sockets inherit it
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"port: cannot listen on {address}: {error.strerror or error}; set another --port") from error
    return sock


class HttpServer:
    """uvicorn without its signal handlers: who runs it says when it ends."""

    def __init__(self, app: FastAPI, *, protocol: type[DeadlineProtocol] = DeadlineProtocol) -> None:
        config = uvicorn.Config(
            app,
            loop="none",
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
            backlog=_BACKLOG,
        )
        self._server = _Uvicorn(config)

    @contextlib.asynccontextmanager
    async def serving(self, sock: socket.socket) -> AsyncIterator[None]:
        """Accept connections on `sock` until the block ends or `stop` is called."""
        task = asyncio.create_task(self._server.serve(sockets=[sock]))
        try:
            yield
        finally:
            self.stop()
            await task

    def stop(self) -> None:
        """Accept nothing more; the answers under way go on."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _wind_down(http: HttpServer, dispatcher: Dispatcher, in_flight: InFlight) -> None:
    """Running answers may end within GRACE_S; what is left is told an error."""
    log.info("router_stopping", in_flight=len(in_flight))
    in_flight.is_closing = True
    http.stop()
    await dispatcher.drain(GRACE_S)
    in_flight.end_all()


async def _until_stopped(stop: asyncio.Event, control: ControlServer) -> None:
    """Returns on a signal. Raises what ended the control server."""
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(control.wait())]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in waits:
            task.cancel()


async def _report(lifeline: Reporter | None, http: Address, control: Address) -> None:
    if lifeline is None:
        return
    lifeline.ready(http=str(http), control=str(control))
    while True:
        lifeline.beat()
        await asyncio.sleep(BEAT_EVERY_S)


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _policy(config: RouterConfig) -> LeastLoaded:
    return LeastLoaded(
        local_prefill=config.local_prefill,
        max_local_prefill_tokens=config.max_local_prefill_tokens,
        expect_prefill=config.expect_prefill,
    )


def _application(
    config: RouterConfig, loaded: LoadedModel, dispatcher: Dispatcher, metrics: RouterMetrics, clock: Clock
) -> FastAPI:
    return build_app(
        loaded.model,
        dispatcher,
        loaded.tokenizer,
        metrics,
        api_keys=config.api_keys,
        clock=clock,
        seed=config.seed,
    )


def _control(config: RouterConfig, model: ServedModel, dispatcher: Dispatcher, secret: bytes) -> ControlServer:
    return ControlServer(
        dispatcher,
        Expected(version=__version__, model=config.served_model_name, max_model_len=config.max_model_len),
        router_id=f"router-{uuid.uuid4().hex[:12]}",
        frame_bytes=max_frame_bytes(model.max_model_len),
        secret=secret,
    )


async def _start_control(control: ControlServer, address: Address) -> Address:
    try:
        return await control.start(address)
    except OSError as error:
        raise ConfigError(f"control_port: cannot listen on {address}: {error.strerror or error}") from error
