"""Checks before anything starts: `serve`, `serve --dry-run` and `doctor` go through the same ones.

    platform ─> ports, files ─> credentials ─> model's files ─> plan ─> device ─> memory, kernels, libraries

Each is ok, warn or fail. The first that fails ends a start with one line; the doctor goes on until a check needs what
failed. Nothing is started here, and nothing is written but a model that is missing.
"""

from __future__ import annotations

import importlib.util
import platform
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from enum import StrEnum
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from ..common.config import environment
from ..common.errors import ConfigError, ProtocolError
from ..common.extras import FLASHINFER, RAY, UCXX, nixl
from ..engine.cpu.build import describe
from ..engine.cpu.compiler import NativeUnavailable
from ..models.checkpoint import check_checkpoint
from ..models.config import ModelConfig
from ..models.default import Progress, cache_dir
from ..models.files import ResolvedModel, find_model, resolve_model
from ..models.probes import kept_probes, probe_distance
from ..models.quantization import chosen_quantization
from ..models.tokenizer import Tokenizer
from ..settings.exposure import check_exposure
from ..settings.fields import ServeSettings
from ..settings.open_files import room_for_connections
from ..settings.sockets import listen
from ..sizing.weights import lacks_native
from ..wire.address import Address
from .engine_checks import (
    check_disk,
    check_draft_model,
    check_engine,
    check_memory,
    check_model,
    is_float32,
    read_adapters,
)
from .host import Host, check_shared_memory, read_host
from .plan import Deployment, absolute, fit_to_host, plan
from .reload import read_credentials
from .running import check_pid_file, runtime_dir

_PLATFORMS = ("x86_64", "aarch64")
_RAY_LIMIT_S = 5.0  # for a connection to its head


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but worse than it could
    FAIL = "fail"  # `kvferry serve` will not work


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    fix: str = ""


class Preflight:
    """The checks of one deployment. Afterwards `deployment` and `model` are what would be started."""

    deployment: Deployment
    model: ModelConfig

    def __init__(
        self,
        settings: ServeSettings,
        env: Mapping[str, str],
        *,
        fetches: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """`fetches`: a model that is not here is downloaded."""
        self._settings = settings
        self._env = env
        self._fetches = fetches
        self._progress = progress
        self._resolved: ResolvedModel | None = None  # None: still on the hub
        self._host = Host(1, 0)

    def run(self) -> Preflight:
        """Raise the first failure as ConfigError."""
        for check in self.checks():
            if check.level is Level.FAIL:
                raise ConfigError(check.found)
        return self

    def checks(self) -> Iterator[Check]:
        """Look at one thing after the other."""
        looks: tuple[tuple[str, Callable[[], str | Check], bool], ...] = (  # whether what follows needs it
            ("platform", check_platform, False),
            ("port", self._check_ports, False),
            ("files", self._check_files, False),
            ("connections", lambda: f"{room_for_connections(self._settings.max_connections)} at once", False),
            ("model", self._check_model, True),
            ("plan", self._check_plan, True),
            ("credentials", self._check_credentials, False),
            ("device", self._check_device, True),
            ("memory", self._check_memory, False),
            ("disk", self._check_disk, False),
            ("kernels", lambda: check_kernels(self.deployment, self.model), False),
            ("transfer", lambda: check_transfer(self._settings), False),
            ("launcher", self._check_launcher, False),
        )
        for name, look, is_needed in looks:
            try:
                found = look()
            except ConfigError as error:
                yield Check(name, Level.FAIL, str(error))
                if is_needed:
                    return
            else:
                yield found if isinstance(found, Check) else Check(name, Level.OK, found)
            if name == "model" and self._resolved is None:
                return

    # --- of the machine -------------------------------------------------------------------------------------------

    def _check_ports(self) -> str:
        settings = self._settings
        addresses = [("port", Address(settings.host, settings.port))]
        if settings.admin_port is not None:
            ports = range(settings.admin_port, settings.admin_port + (settings.routers if settings.admin_port else 1))
            addresses += [("admin_port", Address(settings.admin_host, port)) for port in ports]
        with ExitStack() as stack:  # all at once: they must not be one another's
            for setting, address in addresses:
                stack.enter_context(listen(address, setting=setting))
        return ", ".join(str(address) for _, address in addresses)

    def _check_files(self) -> str:
        settings = self._settings
        if settings.pid_file is not None:
            check_pid_file(settings.pid_file, runtime_dir(self._env))
        for name in ("disk_cache_dir", "data_dir", "answers_dir"):
            given: Path | None = getattr(settings, name)
            if (folder := absolute(given)) is not None:
                _check_folder(name, folder)
        if (folder := absolute(settings.disk_cache_dir)) is not None and folder.exists():
            from ..kvcache.disk_files import check_private

            check_private(folder)
        return "pid file, caches and data can be written"

    # --- of the model ---------------------------------------------------------------------------------------------

    def _check_model(self) -> str | Check:
        settings, find = self._settings, resolve_model if self._fetches else find_model
        found = find(settings.model, settings.revision, self._progress, quantization=settings.quantization)
        if found is None:
            return Check("model", Level.OK, f"{settings.model}: fetched from the hub when it is served")
        self._resolved = found
        self.model = ModelConfig.from_dir(found.dir)
        quantization = chosen_quantization(self.model.quantization, settings.quantization)
        if settings.load_format != "dummy":
            check_checkpoint(found.dir, self.model)
        Tokenizer.from_dir(found.dir, settings.chat_template)
        return f"{found.served_name} in {found.dir}" + (f", {quantization.name}" if quantization is not None else "")

    def _check_plan(self) -> str:
        assert self._resolved is not None
        settings, found = self._settings, self._resolved
        self.deployment = plan(settings, found.dir, settings.name_in_answers(found.served_name), ())
        check_model(self.deployment, self.model)
        read_adapters(self.deployment, self.model)
        check_draft_model(self.deployment, self.model)
        return f"{len(self.deployment.workers)} workers{self._distance()}"

    def _distance(self) -> str:
        """Say how far apart the forms of the weights are that are mixed, if they were measured here."""
        engines = [worker.config.engine for worker in self.deployment.workers]
        forms = sorted({engine.quantization or "plain" for engine in engines})
        if len(forms) < 2:
            return ""
        found = probe_distance(kept_probes(engines[0].model_dir, forms).values())
        apart = "measured when they start" if found is None else f"log-probabilities {found:.3f} apart"
        return f", weights {' and '.join(forms)}: {apart}"

    def _check_credentials(self) -> str:
        """Read keys and secrets. A deployment without a secret of the operator's draws one for itself."""
        router = self.deployment.router
        values = read_credentials(router, self._env)
        check_exposure(router, has_secret=True)
        self.deployment = self.deployment.with_secrets(values or (secrets.token_hex(16).encode(),))
        keys = "API keys are asked for" if router.api_key or router.api_key_file else "no API key is asked for"
        return f"{keys}, {'the given' if values else 'a random'} secret"

    # --- of what runs it ------------------------------------------------------------------------------------------

    def _check_device(self) -> str:
        if self._settings.launcher == "ray":
            return "the cluster's"
        self._host = read_host(self._env)
        self.deployment = fit_to_host(self.deployment, self._host, self.model)
        for worker in self.deployment.workers:
            check_engine(worker.config.engine, self.model)
        device = self.deployment.workers[0].config.engine.device
        names = ", ".join(gpu.name for gpu in self._host.gpus) if device == "cuda" else f"{self._host.num_cpus} cores"
        return f"{device}: {names}"

    def _check_memory(self) -> str:
        if self._settings.launcher == "ray":
            return "the cluster's"
        return check_memory(self.deployment, self._host, self.model)

    def _check_disk(self) -> str:
        return "the cluster's" if self._settings.launcher == "ray" else check_disk(self.deployment)

    def _check_launcher(self) -> str | Check:
        settings = self._settings
        if settings.launcher == "ray" and not RAY.is_installed:
            raise ConfigError(f"launcher: {RAY.missing}")
        if settings.ray_address is not None:
            check_ray_head(settings.ray_address)
            found = "ray; whoever reaches the nodes' UCX ports can read and write the workers' memory"
            return Check("launcher", Level.WARN, found, "keep the nodes on a network of your own")
        return settings.launcher


def check_ray_head(text: str) -> None:
    """Refuse the address of a cluster at which nobody listens, and which Ray would go on trying. Raises ConfigError."""
    if text in ("auto", "local"):  # Ray looks itself
        return
    try:
        address = Address.parse(text.removeprefix("ray://"))
    except ProtocolError:
        raise ConfigError(f"ray_address: {text!r} is neither HOST:PORT nor ray://HOST:PORT") from None
    try:
        socket.create_connection((address.host, address.port), _RAY_LIMIT_S).close()
    except OSError as error:
        raise ConfigError(f"ray_address: nobody answers at {address}: {error}") from error


def _check_folder(setting: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to. Raises ConfigError."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        TemporaryFile(dir=there).close()  # tried, as root may write everywhere by what `access` says, /proc included
    except OSError as error:  # or a folder above it may not be read
        why, flag = error.strerror or error, setting.replace("_", "-")
        raise ConfigError(f"{setting}: {folder} cannot be made or written to: {why}; set another --{flag}") from None


def check_platform() -> str:
    """Raises ConfigError where kvferry does not run at all."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux" or platform.machine() not in _PLATFORMS:
        raise ConfigError(f"kvferry runs on Linux on {' and '.join(_PLATFORMS)}, not {found}")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch is not installed: `pip install kvferry` brings it")
    return found


def check_kernels(deployment: Deployment, model: ModelConfig) -> str | Check:
    """Say what the fitted workers compute with. Raises ConfigError for a GPU without FlashInfer, and for an instruction
    set that the processor lacks.
    """
    engine = deployment.workers[0].config.engine
    if engine.device == "cuda":
        if not FLASHINFER.is_installed:
            raise ConfigError(f"device: a GPU is used, and {FLASHINFER.missing}; or use --device cpu")
        return "FlashInfer"
    try:
        found = f"native, {describe(cache_dir(), engine.cpu_isa, is_float32=is_float32(engine, model))}"
    except NativeUnavailable as error:
        reason = str(error)
    else:
        missing = {one.config.role: lacks_native(one.config.engine, model) for one in deployment.workers}
        slow = [role for role, parts in missing.items() if parts]
        if not slow:
            return found
        reason = f"there is no C++ for {', '.join(dict.fromkeys(chain.from_iterable(missing.values())))}"
        if len(slow) < len(missing):
            reason += f" (of {slow[0]} workers alone)"
    return Check("kernels", Level.WARN, f"torch, several times slower: {reason}")


def check_transfer(settings: ServeSettings) -> str:
    """The library that moves KV. Raises ConfigError where it is missing, or would not work here."""
    library = nixl() if settings.transfer == "nixl" else UCXX
    if not library.is_installed:
        raise ConfigError(f"transfer: {library.missing}")
    if settings.launcher == "local":
        check_shared_memory(environment())
    return settings.transfer
