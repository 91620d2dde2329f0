"""Plans: settings become the processes of a deployment, and those what one machine can hold.

    ServeSettings -> plan -> Deployment -> fit_to_host -> Deployment with threads, GPUs, cache sizes

Pure: what the machine has comes in as a `Host`, what the model is as its `ModelConfig`. Nothing is started here.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..common.config import NO_DETERMINISTIC_CUDA, EngineConfig, Settings, TransferConfig, WorkerConfig
from ..common.errors import ConfigError
from ..common.router_config import AutoscaleConfig, PoolBounds, RouterConfig, strictest_tpot_ms
from ..models.config import ModelConfig
from ..models.parts.gpu_attention import weights_dtype
from ..models.quantization import FLOAT8_CAPABILITY, chosen_quantization
from ..settings.fields import ServeSettings
from ..settings.pools import PoolSettings
from ..sizing.memory import GPU_BATCHED_TOKENS, check_cache_dtype, gpu_reserve_bytes, weight_bytes
from .host import Host

# Prefill fills every core that it may use; a decode step, a token's way through the router or an arrival takes
# milliseconds and somebody reads it. On shared cores they go first: a worker yields while it decodes nothing.
_PREFILL_NICENESS = 10
_MAX_CPU_CACHE_BYTES = 2 << 30
_CPU_CACHE_SHARE = 0.1  # of free memory, for one rank
_CPU_CACHES_SHARE = 0.5  # for all of them
_OF_ONE_PROCESS = {"control_host", "control_port"}  # of a router that is started by hand; a launcher's picks free ones


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    config: WorkerConfig  # routers: filled in once the router's address is known
    gpus: tuple[str, ...] = ()  # for CUDA_VISIBLE_DEVICES, one for each rank
    gpu_share: float = 1.0  # of each of them
    max_threads: int | None = None  # CPU threads while the other workers are idle; None: never more than its own

    @property
    def num_ranks(self) -> int:
        return self.config.engine.tensor_parallel_size


@dataclass(frozen=True, slots=True)
class Deployment:
    router: RouterConfig
    workers: tuple[WorkerPlan, ...]
    num_routers: int = 1  # behind one address
    secrets: tuple[bytes, ...] = field(repr=False, default=())  # the one that is said, and another that is believed
    templates: tuple[WorkerPlan, ...] = ()  # of one more worker of each pool that may grow
    gpus: tuple[str, ...] = ()  # of this host, for workers that come later

    @property
    def max_workers(self) -> int:
        return max(len(self.workers), self.router.autoscale.max_workers)

    @property
    def max_ranks(self) -> int:
        """Once it has grown as far as it may."""
        added = max((worker.num_ranks for worker in self.templates), default=0)
        return self.num_ranks + added * (self.max_workers - len(self.workers))

    @property
    def num_ranks(self) -> int:
        return sum(worker.num_ranks for worker in self.workers)

    def with_secrets(self, values: tuple[bytes, ...]) -> Deployment:
        return replace(self, secrets=values)


def plan(settings: ServeSettings, model_dir: Path, served_name: str, secrets: tuple[bytes, ...] = ()) -> Deployment:
    pools: tuple[tuple[Literal["prefill", "decode"], PoolSettings], ...] = (
        ("prefill", settings.prefill),
        ("decode", settings.decode),
    )
    workers = tuple(
        WorkerPlan(plan_worker(settings, role, pool, model_dir, served_name, worker_id=f"{role[0]}-{index}"))
        for role, pool in pools
        for index in range(pool.workers)
    )
    templates = tuple(
        WorkerPlan(plan_worker(settings, role, pool, model_dir, served_name, worker_id=role[0]))
        for role, pool in pools
        if pool.workers or pool.max_workers
    )
    router = plan_router(settings, model_dir, served_name)
    return Deployment(router, workers, settings.routers, secrets, templates)


def plan_autoscale(settings: ServeSettings) -> AutoscaleConfig:
    """Return the bounds of the fleet. Without a maximum it stays as large as it starts, and the pools share it anew."""
    prefill, decode = settings.prefill, settings.decode
    most = [pool.workers if pool.max_workers is None else pool.max_workers for pool in (prefill, decode)]
    least = [min(1, pool.workers) if pool.min_workers is None else pool.min_workers for pool in (prefill, decode)]
    total = sum(most)
    prefill_most = prefill.max_workers if prefill.max_workers is not None else most[0] and total - least[1]
    decode_most = decode.max_workers if decode.max_workers is not None else total - least[0]
    values = _shared(settings, AutoscaleConfig) | {
        "mode": settings.autoscale,
        "prefill": PoolBounds(at_least=least[0], at_most=prefill_most),
        "decode": PoolBounds(at_least=least[1], at_most=decode_most),
        "max_workers": total,
    }
    return AutoscaleConfig.model_validate(values)


def plan_router(settings: ServeSettings, model_dir: Path, served_name: str) -> RouterConfig:
    """Return the config of every router: settings by their names, and what follows from others."""
    values = _shared(settings, RouterConfig) | {
        "deterministic": settings.is_exact,
        "model_dir": model_dir,
        "served_model_name": served_name,
        "model_aliases": settings.served_model_name[1:],
        "expect_prefill": settings.prefill.workers > 0,
        "autoscale": plan_autoscale(settings),
    }
    return RouterConfig.model_validate(values)


def _shared(settings: ServeSettings, config: type[Settings]) -> dict[str, object]:
    """Return the settings that a config has under the same name; files are the same whatever folder a child runs in."""
    names = config.model_fields.keys() & ServeSettings.model_fields.keys() - _OF_ONE_PROCESS
    values = {name: getattr(settings, name) for name in names}
    return _paths(values)


def _paths(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with paths that hold whatever folder a child runs in."""
    return {name: absolute(value) if isinstance(value, Path) else value for name, value in values.items()}


def plan_worker(
    settings: ServeSettings,
    role: Literal["prefill", "decode"],
    pool: PoolSettings,
    model_dir: Path,
    served_name: str,
    *,
    worker_id: str,
) -> WorkerConfig:
    given = {name: value for name, value in _shared(settings, EngineConfig).items() if value is not None}
    values = given | _paths(pool.overrides()) | {"model_dir": model_dir, "served_model_name": served_name}
    values["tpot_objective_ms"] = strictest_tpot_ms(settings.tpot_objective_ms, settings.classes)
    values["host_cache_memory_bytes"] = settings.host_cache_memory_bytes
    values["swap_space"] = settings.swap_space if role == "decode" else 0  # a prompt that has begun is not preempted
    return WorkerConfig(
        worker_id=worker_id,
        role=role,
        engine=EngineConfig.model_validate(values),
        transfer=TransferConfig(backend=settings.transfer, kv_checksum=settings.kv_checksum),
        routers=settings.router,
        drain_timeout=settings.drain_timeout,
        secret_file=absolute(settings.secret_file),
        log_level=settings.log_level,
        log_format=settings.log_format,
    )


def absolute(path: Path | None) -> Path | None:
    """The same file whatever folder a child runs in."""
    return path.absolute() if path is not None else None


def fit_to_host(deployment: Deployment, host: Host, model: ModelConfig | None = None) -> Deployment:
    """Split cores, GPUs and free memory between the workers. Raises ConfigError where they do not fit."""
    threads = None if host.is_cluster else max(1, host.num_cpus // max(1, deployment.num_ranks))
    num_ranks = max(1, deployment.max_ranks)
    device = _device(deployment, host)
    workers = deployment.workers if device == "cpu" else tuple(_assign_gpus(deployment.workers, host, model))
    if model is not None:
        for worker in workers:
            _check_float8(worker, device, host, model)
    is_exact = any(worker.config.engine.is_exact_on(device) for worker in workers)
    return replace(
        deployment,
        router=deployment.router.model_copy(update={"deterministic": is_exact}),
        workers=tuple(_fit_worker(worker, device, host, threads, num_ranks) for worker in workers),
        templates=tuple(_fit_worker(worker, device, host, threads, num_ranks) for worker in deployment.templates),
        gpus=tuple(gpu.index for gpu in host.gpus) if device == "cuda" else (),
    )


def _check_float8(worker: WorkerPlan, device: Literal["cpu", "cuda"], host: Host, model: ModelConfig) -> None:
    """Refuse to round to 8-bit floats where they are not multiplied by. Raises ConfigError."""
    engine = worker.config.engine
    if (quantization := chosen_quantization(model.quantization, engine.quantization)) is not None:
        known = [gpu.capability for gpu in host.gpus if gpu.index in worker.gpus and gpu.capability is not None]
        has_products = device == "cuda" and min(known, default=FLOAT8_CAPABILITY) >= FLOAT8_CAPABILITY
        is_float32 = weights_dtype(engine, model, is_cuda=device == "cuda") == "float32"
        quantization.check_float8(has_products=has_products, is_float32=is_float32)


def _fit_worker(
    worker: WorkerPlan, device: Literal["cpu", "cuda"], host: Host, threads: int | None, num_ranks: int
) -> WorkerPlan:
    engine = worker.config.engine
    update: dict[str, object] = {"device": device, "num_threads": engine.num_threads or threads}
    if device == "cpu" and engine.kv_cache_memory_bytes is None:
        # Measured once, before any worker takes some: all get the same.
        update["kv_cache_memory_bytes"] = cpu_cache_bytes(host, num_ranks)
    update["max_num_batched_tokens"] = _batched_tokens(worker, device)
    worker = _with_engine(worker, update)
    lends = device == "cpu" and engine.num_threads is None and worker.num_ranks == 1
    if lends and threads is not None and host.num_cpus > threads:
        worker = replace(worker, max_threads=host.num_cpus)
    if device == "cpu":
        worker = replace(worker, config=worker.config.model_copy(update={"niceness": _PREFILL_NICENESS}))
    return worker


def _batched_tokens(worker: WorkerPlan, device: Literal["cpu", "cuda"]) -> int:
    """Return what is set, or what is usual: no less than the rows of a decode step, each of which has a token in it."""
    engine = worker.config.engine
    if "max_num_batched_tokens" in engine.model_fields_set:
        return engine.max_num_batched_tokens
    usual = GPU_BATCHED_TOKENS[worker.config.role] if device == "cuda" else engine.max_num_batched_tokens
    return max(usual, engine.max_num_seqs)


def cpu_cache_bytes(host: Host, num_ranks: int) -> int:
    """KV cache of one rank where nothing is set: a tenth of what is free, less where many ranks share it."""
    share = min(_CPU_CACHE_SHARE, _CPU_CACHES_SHARE / num_ranks)
    return max(1, min(_MAX_CPU_CACHE_BYTES, int(share * host.free_memory_bytes)))


def _device(deployment: Deployment, host: Host) -> Literal["cpu", "cuda"]:
    wanted = deployment.workers[0].config.engine.device
    if wanted == "cuda" and not host.gpus:
        raise ConfigError(
            "device: cuda was asked for, but the installed torch sees no GPU here; "
            "`kvferry doctor` says why, and --device cpu works"
        )
    device: Literal["cpu", "cuda"] = wanted if wanted != "auto" else "cuda" if host.gpus else "cpu"
    if device == "cuda" and deployment.workers[0].config.engine.deterministic:
        raise ConfigError(NO_DETERMINISTIC_CUDA)
    check_cache_dtype(deployment.workers[0].config.engine, is_cpu=device == "cpu")
    if device == "cuda" and deployment.workers[0].config.transfer.kv_checksum == "on":
        raise ConfigError("kv_checksum: on needs KV pages in host memory, and these are a GPU's; use auto or off")
    return device


def _assign_gpus(workers: tuple[WorkerPlan, ...], host: Host, model: ModelConfig | None) -> Iterator[WorkerPlan]:
    """Devices round robin; ranks that share one split its memory."""
    count = len(host.gpus)
    for worker in workers:
        if worker.num_ranks > count:
            raise _too_few_gpus(worker, count)
    starts = [sum(worker.num_ranks for worker in workers[:index]) for index in range(len(workers))]
    taken = [[(start + rank) % count for rank in range(w.num_ranks)] for start, w in zip(starts, workers, strict=True)]
    sharers = Counter(gpu for gpus in taken for gpu in gpus)
    for worker, gpus in zip(workers, taken, strict=True):
        share = 1.0 / max(sharers[gpu] for gpu in gpus)
        if share < 1.0 and worker.num_ranks > 1 and host.is_cluster:
            raise ConfigError(
                f"tensor_parallel_size: Ray gives parts of a GPU to workers of one rank alone; these workers need "
                f"{sum(sharers.values())} GPUs, and the cluster has {count}"
            )
        placed = replace(worker, gpus=tuple(host.gpus[gpu].index for gpu in gpus), gpu_share=share)
        if share < 1.0:
            placed = _with_engine(
                placed, _shared_memory(placed, min(host.gpus[gpu].total_bytes for gpu in gpus), model)
            )
        yield placed


def _too_few_gpus(worker: WorkerPlan, count: int) -> ConfigError:
    fitting = 1 << (count.bit_length() - 1)  # a power of two divides most models' heads
    return ConfigError(
        f"tensor_parallel_size: a {worker.config.role} worker needs {worker.num_ranks} GPUs, this host has {count}; "
        f"what works here: kvferry serve {shlex.quote(str(worker.config.engine.model_dir))} "
        f"--prefill 1 --decode 1 --tensor-parallel-size {fitting}"
    )


def _shared_memory(worker: WorkerPlan, gpu_bytes: int, model: ModelConfig | None) -> dict[str, object]:
    """A worker's part of a GPU. The cache's size is set here: what a worker sees as free depends on who came first."""
    engine = worker.config.engine.model_copy(update={"device": "cuda"})
    utilization = worker.gpu_share * engine.gpu_memory_utilization
    if model is None or engine.kv_cache_memory_bytes is not None or not gpu_bytes:
        return {"gpu_memory_utilization": utilization}
    reserve_bytes = gpu_reserve_bytes(engine, model, _batched_tokens(worker, "cuda"))
    cache_bytes = int(utilization * gpu_bytes) - weight_bytes(engine, model) - reserve_bytes
    if cache_bytes <= 0:
        raise ConfigError(
            f"{worker.config.worker_id}: {utilization:.0%} of a GPU of {gpu_bytes >> 30} GiB does not hold the weights "
            f"({weight_bytes(engine, model) >> 30} GiB) and a cache: start fewer workers on it (--prefill 0 --decode 1)"
        )
    return {"gpu_memory_utilization": utilization, "kv_cache_memory_bytes": cache_bytes}


def _with_engine(worker: WorkerPlan, update: dict[str, object]) -> WorkerPlan:
    engine = worker.config.engine.model_copy(update=update)
    return replace(worker, config=worker.config.model_copy(update={"engine": engine}))
