"""The command `kvferry`: reads settings, checks them, and hands over to what does the work.

A mistake of the operator's is one line on stderr and exit code 2, before anything is started. Neither torch nor ray is
imported here; what a subcommand alone needs is imported inside it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from pydantic import BaseModel

from . import __version__
from .common.config import ADMIN_KEY_VARIABLE, RouterConfig, WorkerConfig, environment, shared_secret
from .common.errors import ConfigError, KVFerryError
from .common.flags import with_settings
from .common.options import PoolSettings, ServeSettings, setting_keys
from .common.settings import Loaded, load, value_of

if TYPE_CHECKING:
    from .common.channel import Address
    from .common.models.config import ModelConfig
    from .common.plan import Deployment, WorkerPlan
    from .common.progress import Display
    from .launch import Launcher

_CONFIG_EXIT_CODE = 2
_WIDE = 140  # columns of a table of requests
_TRANSFER_TRIAL = "from kvferry.transfer.nixl import NixlBackend; NixlBackend('doctor').close()"

app = typer.Typer(
    name="kvferry",
    help="Serve large language models with prefill and decode on separate worker pools.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Show or check settings without starting anything.", no_args_is_help=True)
app.add_typer(config_app, name="config")


def main(argv: list[str] | None = None) -> NoReturn:
    """The console script."""
    try:
        app(args=argv, prog_name="kvferry")
    except KVFerryError as error:
        print(f"kvferry: {error}", file=sys.stderr)
        sys.exit(_CONFIG_EXIT_CODE if isinstance(error, ConfigError) else 1)
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kvferry {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.", metavar="")
    ] = False,
) -> None:
    pass


@app.command()
@with_settings("serve", environment)
def serve(
    loaded: Loaded,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started.", rich_help_panel="Output", metavar="")
    ] = False,
) -> None:
    """Start a router and its workers, on this machine or on Ray, and serve until Ctrl-C.

    SIGTERM drains: running answers finish first. SIGHUP restarts everything, one process at a time.
    """
    import asyncio

    from .common.progress import make_display

    _check_platform()
    settings = loaded.settings
    _check_port(settings.host, settings.port)
    display = make_display(sys.stderr)
    try:
        deployment, model = _plan(settings, display)
        if dry_run:
            print(_describe(deployment, model))
        else:
            asyncio.run(_run(_launcher(settings, deployment, display)))
    finally:
        display.done()


def _plan(settings: ServeSettings, display: Display) -> tuple[Deployment, ModelConfig]:
    from .common.host import read_host
    from .common.model_files import resolve_model
    from .common.models.config import ModelConfig
    from .common.plan import check_model, fit_to_host, plan

    env = environment()
    secret = shared_secret(settings.secret_file, env) or secrets.token_hex(16).encode()
    resolved = resolve_model(
        settings.model,
        settings.revision,
        lambda what, fraction: display.on_event("model", {"event": "progress", "what": what, "fraction": fraction}),
    )
    deployment = plan(settings, resolved.dir, settings.served_model_name or resolved.served_name, secret)
    model = ModelConfig.from_dir(resolved.dir)
    check_model(deployment, model)
    if settings.launcher == "local":
        deployment = fit_to_host(deployment, read_host(env), model)
    return deployment, model


def _launcher(settings: ServeSettings, deployment: Deployment, display: Display) -> Launcher:
    from .common.clock import SystemClock
    from .launch import LocalLauncher, RayLauncher

    def on_serving(http: Address) -> None:
        print(_greeting(settings, deployment, http), flush=True)

    if settings.launcher == "local":
        return LocalLauncher(deployment, environment(), SystemClock(), display, on_serving=on_serving)
    address = settings.ray_address
    return RayLauncher(deployment, environment(), SystemClock(), display, address=address, on_serving=on_serving)


async def _run(launcher: Launcher) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, launcher.stop)
    loop.add_signal_handler(signal.SIGTERM, launcher.drain)
    loop.add_signal_handler(signal.SIGHUP, launcher.restart)
    await launcher.run()


def _greeting(settings: ServeSettings, deployment: Deployment, http: Address) -> str:
    from .common.children import reachable

    name = deployment.router.served_model_name
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key else ""
    body = {
        "model": name,
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    url = f"http://{reachable(http)}/v1"
    return (
        f"kvferry serves {name} at {url} ({_pools(deployment)}). Ctrl-C ends it. Try:\n"
        f"  curl -N {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    )


def _pools(deployment: Deployment) -> str:
    roles = [worker.config.role for worker in deployment.workers]
    routers = f"{deployment.num_routers} routers, " if deployment.num_routers > 1 else ""
    return f"{routers}{roles.count('prefill')} prefill, {roles.count('decode')} decode"


def _describe(deployment: Deployment, model: ModelConfig) -> str:
    """The plan, a line for each process."""
    from .common.channel import Address
    from .common.plan import cache_token_bytes, weight_bytes

    router = deployment.router
    lines = [
        f"model   {router.served_model_name} in {router.model_dir}",
        f"router  http://{Address(router.host, router.port)}, {_pools(deployment)}",
    ]
    for worker in deployment.workers:
        engine = worker.config.engine
        cache = engine.kv_cache_memory_bytes
        per_block = cache_token_bytes(engine, model) * engine.block_size
        room = "from free memory"
        if cache is not None:
            blocks = cache // per_block
            room = f"{_size(cache)} = {blocks} blocks = {blocks * engine.block_size} tokens"
        lines.append(
            f"{worker.config.worker_id:7} {worker.config.role}, {worker.num_ranks} rank(s), {_place(worker)}, "
            f"weights {_size(weight_bytes(engine, model))}, KV cache {room}"
        )
    return "\n".join(lines)


def _place(worker: WorkerPlan) -> str:
    engine = worker.config.engine
    if worker.gpus:
        return f"GPU {','.join(worker.gpus)}"
    threads = f"{engine.device}, {engine.num_threads} thread(s)"
    return threads if worker.max_threads is None else f"{threads}, {worker.max_threads} while the others are idle"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"


@app.command()
@with_settings("router", environment)
def router(loaded: Loaded) -> None:
    """Start a router by hand; workers connect to its control socket."""
    from .common.channel import Address
    from .common.children import ROUTER_PROGRAM
    from .common.model_files import resolve_model
    from .common.plan import plan_router

    settings = loaded.settings
    _check_port(settings.host, settings.port)
    secret = _secret_for(settings, [Address(settings.control_host, settings.control_port)])
    resolved = resolve_model(settings.model, settings.revision)
    config = plan_router(settings, resolved.dir, settings.served_model_name or resolved.served_name)
    update = {"control_host": settings.control_host, "control_port": settings.control_port}
    keyless = config.model_copy(update={**update, "api_keys": (), "admin_keys": ()})
    _become(ROUTER_PROGRAM, keyless, secret, api_keys=settings.api_key, admin_keys=settings.admin_key)


@app.command()
@with_settings("prefill", environment)
def prefill(loaded: Loaded) -> None:
    """Start a prefill worker by hand."""
    _become_worker(loaded.settings, "prefill")


@app.command()
@with_settings("decode", environment)
def decode(loaded: Loaded) -> None:
    """Start a decode worker by hand."""
    _become_worker(loaded.settings, "decode")


def _become_worker(settings: ServeSettings, role: Literal["prefill", "decode"]) -> NoReturn:
    from .common.channel import Address
    from .common.children import WORKER_PROGRAM
    from .common.host import read_host
    from .common.model_files import resolve_model
    from .common.plan import Deployment, WorkerPlan, fit_to_host, plan_router, plan_worker

    _check_platform()
    if not settings.router:
        raise ConfigError(f"router: a {role} worker needs --router HOST:PORT, the control socket of its router")
    routers = [Address.parse(text) for text in settings.router]
    secret = _secret_for(settings, [Address(settings.handoff_host, settings.handoff_port), *routers])
    resolved = resolve_model(settings.model, settings.revision)
    name = settings.served_model_name or resolved.served_name
    worker_id = settings.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
    pool: PoolSettings = getattr(settings, role)
    config = plan_worker(settings, role, pool, resolved.dir, name, worker_id=worker_id)
    config = config.model_copy(update={"host": settings.handoff_host, "port": settings.handoff_port})
    alone = Deployment(plan_router(settings, resolved.dir, name), (WorkerPlan(config),))
    fitted = fit_to_host(alone, read_host(environment())).workers[0].config
    _become(WORKER_PROGRAM, fitted, secret, loopback=all(address.is_loopback for address in routers))


def _secret_for(settings: ServeSettings, addresses: list[Address]) -> bytes:
    """The shared secret; sockets that other machines reach do not go without."""
    secret = shared_secret(settings.secret_file, environment())
    exposed = [str(address) for address in addresses if not address.is_loopback]
    if exposed and not secret:
        raise ConfigError(
            f"secret_file: {exposed[0]} is no loopback address: --secret-file FILE or KVFERRY_SECRET is needed"
        )
    return secret


def _become(
    program: tuple[str, ...],
    config: RouterConfig | WorkerConfig,
    secret: bytes,
    *,
    loopback: bool = False,
    api_keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
) -> NoReturn:
    """Replace this process: its id, terminal and signals are the program's from here on."""
    from .common.children import child_environment

    env = child_environment(environment(), secret, loopback=loopback, api_keys=api_keys, admin_keys=admin_keys)
    os.execve(program[0], [*program, "--config-json", config.model_dump_json()], env)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure a running server: TTFT, TPOT and goodput under load (--help for its options)."""
    from .benchmarks import client

    raise typer.Exit(client.main(context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def chaos(context: typer.Context) -> None:
    """Kill workers of a deployment of its own under load; fails if anything is lost or changed (--help: options)."""
    from .benchmarks import chaos as program

    raise typer.Exit(program.main(context.args))


@app.command()
def explain(
    admin: Annotated[str, typer.Option(help="A router's admin listener.", metavar="URL")],
    request_id: Annotated[
        str | None, typer.Argument(metavar="REQUEST_ID", help="x-request-id or an answer's id. Without one: a list.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar=ADMIN_KEY_VARIABLE, help="Its key.", metavar="KEY", show_envvar=True)
    ] = None,
    kind: Annotated[str, typer.Option(help="Of a list: recent, slowest or failed.", metavar="TEXT")] = "recent",
) -> None:
    """Show why a request went where it went, what was expected of it and which phase spent its time."""
    from rich.console import Console

    from .router.explain_view import fetch, list_path, path_of, show, show_list

    console, key = Console(highlight=False), (admin_key or "").partition(",")[0]
    console.width = max(console.width, _WIDE)  # ids are for copying: a narrow terminal wraps lines, but cuts none
    if request_id is None:
        show_list(console, fetch(admin, list_path(kind), key)["requests"])
    else:
        show(console, fetch(admin, path_of(request_id), key))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context) -> None:
    """Simulate a fleet under a trace: goodput, latencies, GPUs and cost (--help for its options)."""
    from .benchmarks.simulator import command

    raise typer.Exit(command.main(context.args))


@app.command()
@with_settings("serve", environment)
def doctor(loaded: Loaded) -> None:
    """Check whether `kvferry serve` will work with the same options, and say how to mend what will not."""
    from rich.console import Console

    from .common.doctor import Level, examine

    settings, console = loaded.settings, Console(highlight=False, soft_wrap=True)
    colors = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
    trial = (sys.executable, "-c", _TRANSFER_TRIAL)
    failed = False
    for check in examine(
        environment(), model=settings.model, host=settings.host, port=settings.port, transfer_trial=trial
    ):
        failed |= check.level is Level.FAIL
        console.print(f"[{colors[check.level]}]{check.level:5}[/]", f"{check.name:14}", end="")
        console.print(f"{check.found}{' -> ' + check.fix if check.fix else ''}", markup=False)
    raise typer.Exit(1 if failed else 0)


@config_app.command("show")
@with_settings("serve", environment)
def config_show(
    loaded: Loaded,
    origins: Annotated[bool, typer.Option("--origins", help="Say where each value comes from.", metavar="")] = False,
) -> None:
    """Print every setting as YAML, as `serve` with the same options would see it."""
    section = ""
    for key in setting_keys().values():
        value = value_of(loaded.settings, key)
        head, _, own = key.rpartition(".")
        if head != section and head:
            print(f"{head}:")
        section = head
        shown = ["***"] * len(value) if key in ("api_key", "admin_key") and isinstance(value, tuple) else value
        comment = f"  # {loaded.origins[key]}" if origins else ""
        print(f"{'  ' if head else ''}{own}: {json.dumps(shown, default=_plain)}{comment}")  # JSON is YAML


def _plain(value: object) -> object:
    """A setting's value as JSON has it."""
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else str(value)


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML settings.")]) -> None:
    """Check a YAML file; exit code 2 with a line for each mistake."""
    load(flags={}, env={}, file=file)
    print(f"{file}: ok")


def _check_platform() -> None:
    import importlib.util

    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise ConfigError(f"kvferry runs on Linux on x86_64 and aarch64, not {sys.platform} on {platform.machine()}")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch is not installed: `pip install kvferry` brings it; `kvferry doctor` checks the rest")


def _check_port(host: str, port: int) -> None:
    from .common.channel import Address
    from .common.host import why_not_bindable

    if why := why_not_bindable(host, port):
        raise ConfigError(f"port: cannot listen at {Address(host, port)}: {why}; --port 0 takes any free one")
