"""`kvferry serve`, and the processes of a cluster by hand: `router`, `prefill`, `decode`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from ..common.config import WorkerConfig, environment
from ..common.errors import ConfigError, ProtocolError
from ..common.imports import kept_imports
from ..common.router_config import RouterConfig
from ..settings.fields import ServeSettings
from ..settings.flags import with_settings
from ..settings.load import Loaded
from ..settings.pools import PoolSettings
from ..settings.values import check_host
from .deployment import description, greeting
from .inherited import mend_inheritance

if TYPE_CHECKING:
    from ..launch.launcher import Launcher
    from ..launch.plan import Deployment
    from ..launch.progress import Display
    from ..models.config import ModelConfig
    from ..wire.address import Address


def register(app: typer.Typer) -> None:
    command = app.command(rich_help_panel="Serve")
    for function in (serve, router, prefill, decode):
        command(function)


@with_settings("serve", environment)
def serve(
    loaded: Loaded,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started.", rich_help_panel="Output", metavar="")
    ] = False,
) -> None:
    """Start a router and its workers, on this machine or on Ray, and serve until Ctrl-C.

    SIGTERM drains: running answers finish first. SIGHUP reads keys and certificates. `kvferry restart` restarts all.
    """
    import asyncio

    if not dry_run:
        _ignore_reloads()
    mend_inheritance()
    with kept_imports():
        from ..common.lines import drain
        from ..common.logs import configure_logging, resolve_format
        from ..launch.preflight import Preflight
        from ..launch.progress import make_display

    settings, env = loaded.settings, environment()
    log_format = resolve_format(settings.log_format, sys.stderr)
    settings = settings.model_copy(update={"log_format": log_format})  # children may write into a pipe
    configure_logging(settings.log_level, log_format=log_format, process="launcher")
    display = make_display(sys.stderr, is_text=log_format == "text")

    def on_progress(what: str, fraction: float) -> None:
        display.on_event("model", {"event": "progress", "what": what, "fraction": fraction})

    try:
        preflight = Preflight(settings, env, progress=on_progress).run()
        if dry_run:
            print(description(preflight.deployment, preflight.model))
        else:
            launcher = _launcher(settings, preflight.deployment, preflight.model, display)
            asyncio.run(_run(launcher, settings.pid_file, display))
    finally:
        display.done()
        drain()  # what is said next goes past the log


def _ignore_reloads() -> None:
    """Let SIGHUP end nothing until a program takes it: what will start reads the files itself, as they are then.

    The program that takes this process's place inherits that.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _launcher(settings: ServeSettings, deployment: Deployment, model: ModelConfig, display: Display) -> Launcher:
    from ..common.clock import SystemClock
    from ..launch.local import LocalLauncher
    from ..launch.on_ray import RayLauncher

    def on_serving(http: Address) -> None:
        display.greet(*greeting(settings, deployment, model, http))

    if settings.launcher == "local":
        return LocalLauncher(deployment, environment(), SystemClock(), display, on_serving=on_serving)
    address = settings.ray_address
    return RayLauncher(deployment, environment(), SystemClock(), display, address=address, on_serving=on_serving)


async def _run(launcher: Launcher, pid_path: Path | None, display: Display) -> None:
    import asyncio

    import structlog

    from ..launch.command_socket import command_socket
    from ..launch.running import make_runtime_dir, pid_file, socket_of

    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[list[str]]]()

    def reload() -> None:
        task = loop.create_task(launcher.reload())
        tasks.add(task)
        task.add_done_callback(on_reloaded)

    def on_reloaded(task: asyncio.Task[list[str]]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log = structlog.get_logger()
            log.error("reload_failed", error=f"{type(error).__name__}: {error}", exc_info=error)

    loop.add_signal_handler(signal.SIGINT, launcher.stop)
    loop.add_signal_handler(signal.SIGTERM, launcher.drain)
    loop.add_signal_handler(signal.SIGHUP, reload)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(pid_file(pid_path))
        try:
            path = socket_of(make_runtime_dir(environment()), os.getpid())
            await stack.enter_async_context(command_socket(path, launcher))
        except (ConfigError, OSError) as error:
            display.note(f"kvferry status, reload, restart and drain cannot reach this deployment: {error}")
        await launcher.run()
    display.note("everything has ended")


# --- processes by hand --------------------------------------------------------------------------------------------


@with_settings("router", environment)
def router(loaded: Loaded) -> None:
    """Start a router by hand; workers connect to its control socket."""
    from ..launch.children import ROUTER_PROGRAM
    from ..launch.plan import plan_router
    from ..launch.reload import read_credentials
    from ..models.config import ModelConfig
    from ..models.files import resolve_model
    from ..settings.exposure import check_exposure
    from ..settings.sockets import listen
    from ..wire.address import Address

    _ignore_reloads()
    mend_inheritance()
    settings = loaded.settings
    listen(Address(settings.host, settings.port)).close()
    resolved = resolve_model(settings.model, settings.revision, quantization=settings.quantization)
    ModelConfig.from_dir(resolved.dir).check_length(settings.max_model_len)  # workers of that length are refused else
    config = plan_router(settings, resolved.dir, settings.name_in_answers(resolved.served_name))
    config = config.model_copy(update={"control_host": settings.control_host, "control_port": settings.control_port})
    secrets = read_credentials(config, environment())
    _check_secret(settings, secrets, [Address(settings.control_host, settings.control_port)])
    check_exposure(config, has_secret=bool(secrets))
    keyless = config.model_copy(update={"api_key": (), "admin_key": ()})
    _become(ROUTER_PROGRAM, keyless, secrets, api_keys=settings.api_key, admin_keys=settings.admin_key)


@with_settings("prefill", environment)
def prefill(loaded: Loaded) -> None:
    """Start a prefill worker by hand."""
    _become_worker(loaded.settings, "prefill")


@with_settings("decode", environment)
def decode(loaded: Loaded) -> None:
    """Start a decode worker by hand."""
    _become_worker(loaded.settings, "decode")


def _become_worker(settings: ServeSettings, role: Literal["prefill", "decode"]) -> NoReturn:
    from ..launch.children import WORKER_PROGRAM
    from ..launch.host import read_host
    from ..launch.plan import Deployment, WorkerPlan, fit_to_host, plan_router, plan_worker
    from ..launch.preflight import check_kernels, check_platform, check_transfer
    from ..models.config import ModelConfig
    from ..models.files import resolve_model
    from ..settings.sockets import listen
    from ..wire.address import Address
    from ..wire.credentials import read_secrets

    _ignore_reloads()
    mend_inheritance()
    check_platform()
    if not settings.router:
        raise ConfigError(f"router: a {role} worker needs --router HOST:PORT, the control socket of its router")
    routers = [_router_address(text) for text in settings.router]
    secrets = read_secrets(settings.secret_file, environment())
    handoff = Address(settings.handoff_host, settings.handoff_port)
    _check_secret(settings, secrets, [handoff, *routers])
    listen(handoff, setting="handoff_port", flag="--port").close()
    check_transfer(settings)
    resolved = resolve_model(settings.model, settings.revision, quantization=settings.quantization)
    name = settings.name_in_answers(resolved.served_name)
    worker_id = settings.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
    pool: PoolSettings = getattr(settings, role)
    config = plan_worker(settings, role, pool, resolved.dir, name, worker_id=worker_id)
    config = config.model_copy(update={"host": settings.handoff_host, "port": settings.handoff_port})
    alone = Deployment(plan_router(settings, resolved.dir, name), (WorkerPlan(config),))
    model = ModelConfig.from_dir(resolved.dir)
    fitted = fit_to_host(alone, read_host(environment()), model)
    check_kernels(fitted, model)
    _become(WORKER_PROGRAM, fitted.workers[0].config, secrets)


def _router_address(text: str) -> Address:
    from ..wire.address import Address

    try:
        address = Address.parse(text)
        check_host(address.host)
    except ProtocolError as error:
        raise ConfigError(f"router: {error}") from None
    except ValueError as error:
        raise ConfigError(f"router: {text!r} is not host:port: the host {error}") from None
    return address


def _check_secret(settings: ServeSettings, secrets: tuple[bytes, ...], addresses: list[Address]) -> None:
    """Refuse to go without a secret: on sockets that other machines reach, and, unless told to, on the loopback."""
    exposed = [str(address) for address in addresses if not address.is_loopback]
    if exposed and not secrets:
        raise ConfigError(
            f"secret_file: {exposed[0]} is no loopback address: --secret-file FILE or KVFERRY_SECRET is needed"
        )
    if not secrets and not settings.insecure_loopback:
        raise ConfigError(
            "secret_file: without a secret every process of this machine may join and read prompts: give --secret-file "
            "FILE or KVFERRY_SECRET, or say --insecure-loopback"
        )


def _become(
    program: tuple[str, ...],
    config: RouterConfig | WorkerConfig,
    secrets: tuple[bytes, ...],
    *,
    api_keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
) -> NoReturn:
    """Replace this process: its id, terminal and signals are the program's from here on."""
    from ..launch.children import child_environment

    given = () if config.secret_file is not None else secrets  # it reads a file itself, again at each reload
    env = child_environment(environment(), given, api_keys=api_keys, admin_keys=admin_keys)
    os.execve(program[0], [*program, "--config-json", config.model_dump_json()], env)
