"""Settings: parsed once at the edge, then frozen and passed down by constructor.

A YAML key is the flag's name with underscores; `KVFERRY_` + upper case is its environment variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Attention = Literal["auto", "flashinfer", "cpu"]
LoadFormat = Literal["auto", "safetensors", "dummy"]


class Settings(BaseModel):
    """Base of the settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(Settings):
    """What one worker's engine needs."""

    model_dir: Path  # a local Hugging Face directory
    served_model_name: str
    dtype: Dtype = "auto"  # auto: the checkpoint's
    device: Device = "auto"
    tensor_parallel_size: PositiveInt = 1
    block_size: Literal[8, 16, 32, 64, 128] = 16  # tokens
    max_model_len: PositiveInt | None = None  # None: the model's own
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 512
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_memory_bytes: PositiveInt | None = None  # None: from free memory
    enable_prefix_caching: bool = True
    attention_backend: Attention = "auto"
    load_format: LoadFormat = "auto"
    seed: int = 0
    num_threads: PositiveInt | None = None  # CPU threads of one rank; None: set by the launcher


class TransferConfig(Settings):
    """How KV moves, and the handoff's times (seconds). Lease arithmetic: transfer/sender.py."""

    backend: Literal["nixl", "ucx"] = "nixl"
    lease_s: float = Field(3.0, gt=0)
    renew_every_s: float = Field(1.0, gt=0)
    open_within_s: float = Field(2.0, gt=0)
    write_timeout_s: float = Field(2.0, gt=0)


class WorkerConfig(Settings):
    """One worker process."""

    worker_id: str
    role: Literal["prefill", "decode"]
    engine: EngineConfig
    transfer: TransferConfig = TransferConfig()
    routers: tuple[str, ...]  # host:port of each router's control socket
    host: str = "127.0.0.1"  # where this worker's handoff socket listens
    port: int = 0  # 0: any free port
    log_level: str = "info"


class RouterConfig(Settings):
    """The router process."""

    host: str = "127.0.0.1"
    port: int = 8000
    control_host: str = "127.0.0.1"
    control_port: int = 0  # 0: any free port
    model_dir: Path
    served_model_name: str
    max_model_len: PositiveInt | None = None
    chat_template: Path | None = None
    api_keys: tuple[str, ...] = ()
    local_prefill: bool = True  # False (--no-local-prefill): a prompt is never computed on a decode worker
    max_local_prefill_tokens: int = Field(0, ge=0)
    max_queue: PositiveInt = 4096  # requests waiting in the router
    max_attempts: PositiveInt = 5
    seed: int = 0
    log_level: str = "info"
