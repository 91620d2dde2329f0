"""Says what a deployment is: the plan of a dry run, and a greeting when requests can come."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING

from ..settings.fields import ServeSettings

if TYPE_CHECKING:
    from ..launch.plan import Deployment, WorkerPlan
    from ..models.config import ModelConfig
    from ..wire.address import Address


def greeting(
    settings: ServeSettings, deployment: Deployment, model: ModelConfig, http: Address
) -> tuple[str, dict[str, object]]:
    """Return what people read when requests can come, and the same for programs."""
    from ..launch.children import reachable
    from ..settings.tls import http_scheme

    name = deployment.router.served_model_name
    has_keys = bool(settings.api_key or settings.api_key_file)
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    body = {
        "model": name,
        "stream": True,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    url = f"{http_scheme(deployment.router)}://{reachable(http)}/v1"
    text = (
        f"kvferry serves {name} at {url} ({_pools(deployment)}). Ctrl-C ends it. Try:\n"
        f"  curl -N {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'\n"
        f"{_layout(deployment, model)}"
    )
    return text, {"model": name, "url": url, "pools": _pools(deployment), "asks_for_keys": has_keys}


def _pools(deployment: Deployment) -> str:
    roles = [worker.config.role for worker in deployment.workers]
    routers = f"{deployment.num_routers} routers, " if deployment.num_routers > 1 else ""
    return f"{routers}{roles.count('prefill')} prefill, {roles.count('decode')} decode"


def _layout(deployment: Deployment, model: ModelConfig) -> str:
    """Say what these workers are good for, and what would be the other choice."""
    return f"{_division(deployment)}{_in_torch(deployment, model)}"


def _in_torch(deployment: Deployment, model: ModelConfig) -> str:
    """Say that torch computes a model on CPUs, where there is no C++ for a part of it."""
    from ..sizing.weights import lacks_native

    found = (lacks_native(worker.config.engine, model) for worker in deployment.workers if not worker.gpus)
    missing = dict.fromkeys(chain.from_iterable(found))  # once each
    return f" Torch computes the model: there is no C++ for {', '.join(missing)}." if missing else ""


def _division(deployment: Deployment) -> str:
    """Say how the workers divide prompts and answers."""
    objective_ms = deployment.workers[0].config.engine.tpot_objective_ms
    limit = f"{objective_ms:g} ms" if objective_ms else "50 ms, or four times its usual (--tpot-objective-ms)"
    if all(worker.config.role == "decode" for worker in deployment.workers):
        return f"Each worker computes prompts beside answers: a token takes up to {limit}. --prefill 1 steadies it."
    lent = any(worker.max_threads is not None for worker in deployment.workers)
    cores = " and lend each other idle cores" if lent else ""
    return (
        f"Prompts and answers have workers of their own{cores}: answers are steady beside long prompts. Where a decode "
        f"worker takes a prompt too, a token takes up to {limit}. --prefill 0 begins several answers sooner."
    )


def description(deployment: Deployment, model: ModelConfig) -> str:
    """Return the plan, a line for each process."""
    from ..settings.tls import http_scheme
    from ..sizing.memory import block_tokens, cache_token_bytes, weight_bytes
    from ..wire.address import Address

    router = deployment.router
    lines = [
        f"model   {router.served_model_name} in {router.model_dir}",
        f"router  {http_scheme(router)}://{Address(router.host, router.port)}, {_pools(deployment)}",
    ]
    speculative = deployment.workers[0].config.engine.speculative_config
    if speculative is not None and speculative.model is not None:
        lines.append(f"draft   {speculative.model}, its KV in the same blocks")
    for worker in deployment.workers:
        engine = worker.config.engine
        cache = engine.kv_cache_memory_bytes
        block_size = block_tokens(engine, model)
        per_block = cache_token_bytes(engine, model) * block_size
        room = "from free memory"
        if cache is not None:
            blocks = cache // per_block
            room = f"{_size(cache)} = {blocks} blocks = {blocks * block_size} tokens"
        lines.append(
            f"{worker.config.worker_id:7} {worker.config.role}, {worker.num_ranks} rank(s), {_place(worker)}, "
            f"weights {_size(weight_bytes(engine, model))}, KV cache {room}"
        )
    return "\n".join([*lines, f"layout  {_layout(deployment, model)}"])


def _place(worker: WorkerPlan) -> str:
    engine = worker.config.engine
    if worker.gpus:
        return f"GPU {','.join(worker.gpus)}"
    if engine.num_threads is None:  # on Ray
        return f"{engine.device}, threads by its node"
    threads = f"{engine.device}, {engine.num_threads} thread(s)"
    return threads if worker.max_threads is None else f"{threads}, {worker.max_threads} while the others are idle"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
