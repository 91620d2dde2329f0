"""Settings: parsed once at the edge, then frozen and passed down by constructor.

A YAML key is the flag's name with underscores; `KVFERRY_` + upper case is its environment variable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

SECRET_VARIABLE = "KVFERRY_SECRET"
API_KEY_VARIABLE = "KVFERRY_API_KEY"
ADMIN_KEY_VARIABLE = "KVFERRY_ADMIN_KEY"
NO_DETERMINISTIC_CUDA = (
    "deterministic: only on CPUs; on a GPU, kernels are chosen by how many tokens are computed together. Use "
    "--device cpu, or leave it off: no token is lost or doubled, but one that nearly tied may change on resume"
)
BLOCK_SIZE = 16  # tokens, where nothing else is said
LONG_BLOCK_SIZES = (256, 512, 1024, 2048)  # for models that keep states alone
BlockSize = Literal[8, 16, 32, 64, 128, 256, 512, 1024, 2048]
NO_INT8_LATENTS = "kv_cache_dtype: int8 keeps keys and values of heads, not latents; use auto"
CACHE_VARIABLE = "KVFERRY_CACHE"  # where `default_model` keeps what it made
FAILPOINTS_VARIABLE = "KVFERRY_FAILPOINTS"  # faults of a drill, see failpoints.py

Dtype = Literal["auto", "float32", "bfloat16"]
KVCacheDtype = Literal["auto", "bfloat16", "fp8", "int8"]
Device = Literal["auto", "cpu", "cuda"]
CpuIsa = Literal["auto", "amx", "avx512_bf16", "avx2", "neon_bf16", "neon"]  # engine/cpu/compiler.py
Attention = Literal["auto", "flashinfer", "flashinfer_fp8", "cpu"]
ExpertExchange = Literal["sum", "all_to_all"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
# int8, int4 and fp8 are made while a plain checkpoint is loaded; the others, and fp8, say what the checkpoint is.
QuantizationName = Literal["int8", "int4", "gguf", "compressed-tensors", "gptq", "awq", "fp8", "modelopt"]
WeightsForm = Literal["plain", "int8", "int4", "fp8"]  # of one plain checkpoint's weights
TransferName = Literal["nixl", "ucx"]
Checksum = Literal["auto", "on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "text", "json"]


class Settings(BaseModel):
    """Base of the settings: frozen, unknown keys refused, and numbers that JSON has, as which children get them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SpeculativeConfig(Settings):
    """`SpeculativeConfig` says how decode workers draft tokens, under vLLM's names."""

    # From the sequence's own tokens, from those of earlier answers as well, or by a smaller model.
    method: Literal["ngram", "suffix", "draft_model"]
    model: Path | None = None  # draft_model's: a local directory; its tokenizer is the served model's
    num_speculative_tokens: int = Field(5, ge=1, le=16)  # of one sequence and step; fewer where more do not pay
    prompt_lookup_min: int = Field(2, ge=1, le=16)  # shortest match, tokens
    prompt_lookup_max: int = Field(4, ge=1, le=16)  # match lengths beyond it count as equal
    suffix_decoding_max_tree_depth: int = Field(24, ge=1, le=64)  # match lengths beyond it count as equal to suffix
    suffix_decoding_max_cached_requests: int = Field(10_000, ge=0, le=1_000_000)  # earlier answers, the latest ones
    suffix_decoding_max_spec_factor: float = Field(1.0, gt=0, le=16)  # a draft's length over its match's, at most
    suffix_decoding_min_token_prob: float = Field(0.1, ge=0, le=1)  # of a drafted token, by what followed before

    @model_validator(mode="before")
    @classmethod
    def _draft_long(cls, values: object) -> object:
        """Let suffix draft as many tokens as its matches allow where no number is given."""
        if isinstance(values, Mapping) and values.get("method") == "suffix":
            return {"num_speculative_tokens": 16, **values}
        return values

    @field_validator("model")
    @classmethod
    def _make_absolute(cls, model: Path | None) -> Path | None:
        """Name the same directory whatever folder a worker runs in."""
        return Path(os.path.expanduser(model)).absolute() if model is not None else None

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if (self.model is not None) != (self.method == "draft_model"):
            raise ValueError(f"model: method {self.method} {'needs a directory' if self.model is None else 'has none'}")
        return self

    @model_validator(mode="after")
    def _check_lookup(self) -> Self:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max {self.prompt_lookup_max} is below prompt_lookup_min {self.prompt_lookup_min}"
            )
        return self


class EngineConfig(Settings):
    """Settings of one worker's engine."""

    model_dir: Path  # a local Hugging Face directory
    served_model_name: str
    dtype: Dtype = "auto"  # auto: the checkpoint's
    quantization: QuantizationName | None = None  # None: the checkpoint's
    mixed_quantization: tuple[WeightsForm, ...] = ()  # workers of these may exchange KV; empty: all have one
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: as `dtype`; fp8 is e4m3; int8 has scales
    device: Device = "auto"
    tensor_parallel_size: PositiveInt = 1
    enable_expert_parallel: bool = False  # a rank's experts are whole ones, not parts of all
    expert_plan: Path | None = None  # file that says which ones (expert_plan.py); None: an even split
    expert_exchange: ExpertExchange = "sum"  # how whole experts' rows and results go between ranks
    block_size: BlockSize | None = None  # tokens; None: 16, or as a model's states demand (models/parts/states.py)
    max_model_len: PositiveInt | None = None  # None: the model's own
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 512
    tpot_objective_ms: float | None = Field(None, gt=0)  # prompts beside running answers are cut so that it is kept
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_memory_bytes: PositiveInt | None = None  # None: from free memory
    swap_space: int | None = Field(0, ge=0)  # host memory of a rank for preempted KV, bytes; None: host_slots.py
    enable_prefix_caching: bool = True
    host_cache_memory_bytes: int | None = Field(
        0, ge=0
    )  # of a rank, for cached KV that the device evicts; None: host_slots.py
    disk_cache_dir: Path | None = None  # for cached KV that host memory evicts; None: no disk
    disk_cache_bytes: PositiveInt = 10 << 30  # of a rank
    attention_backend: Attention = "auto"
    cpu_isa: CpuIsa = "auto"  # of the C++ on a CPU; auto: the best that the processor has
    deterministic: bool = False  # a token's results depend on the tokens before it alone, to the bit; on CPUs
    speculative_config: SpeculativeConfig | None = None  # of decode steps; None: one token a step
    enable_lora: bool = False  # requests may have adapters
    max_loras: int = Field(8, ge=1, le=1024)  # adapters in the engine's slots at once
    max_lora_rank: int = Field(16, ge=1, le=256)  # the largest that is loaded; each slot has room for it
    max_cpu_loras: int | None = Field(None, ge=1)  # adapters in host memory, those in slots among them; None: max_loras
    lora_experts: bool = False  # on a GPU each slot has room for a mixture's experts, too
    enforce_eager: bool = False  # decode steps on a GPU without CUDA graphs: Python launches every kernel
    load_format: LoadFormat = "auto"
    seed: int = 0
    num_threads: PositiveInt | None = None  # CPU threads of one rank; None: set by the launcher

    @property
    def block_tokens(self) -> int:
        """Count the tokens of a block, for a model that keeps no states."""
        return self.block_size or BLOCK_SIZE

    def is_exact_on(self, device: str) -> bool:
        """Tell whether results are to be exact on a kind of device: drafts, too, ask for it where it can be had."""
        return self.deterministic or (self.speculative_config is not None and device == "cpu")

    @property
    def exchanges_experts(self) -> bool:
        """Tell whether a rank sends tokens to the ranks of their experts alone, instead of summing over all."""
        return self.expert_exchange == "all_to_all"


class TransferConfig(Settings):
    """Settings of the handoff, with its times in seconds. Lease arithmetic: transfer/send/sender.py."""

    backend: TransferName = "nixl"
    lease_s: float = Field(3.0, gt=0)
    renew_every_s: float = Field(1.0, gt=0)
    open_within_s: float = Field(2.0, gt=0)
    write_timeout_s: float = Field(2.0, gt=0)
    kv_checksum: Checksum = "auto"  # of shipped blocks; auto: where the pages are host memory


class CoreSlot(Settings):
    """A worker's place among those that share a machine's cores (cores.py)."""

    path: str  # of the memory that they share
    num_slots: PositiveInt
    slot: int = Field(ge=0)
    max_threads: PositiveInt  # while the others are idle


class WorkerConfig(Settings):
    """One worker process."""

    worker_id: str
    role: Literal["prefill", "decode"]  # its active role at first
    engine: EngineConfig
    transfer: TransferConfig = TransferConfig()
    routers: tuple[str, ...]  # host:port of each router's control socket
    host: str = "127.0.0.1"  # where this worker's handoff socket listens
    port: int = 0  # 0: any free port
    cores: CoreSlot | None = None  # None: `engine.num_threads`, whatever the others do
    niceness: int = Field(0, ge=0, le=19)  # while it decodes nothing: it yields the cores to those who do
    labels: tuple[tuple[str, str], ...] = ()  # where it is, from wide to narrow; empty: its host's name
    calibration_s: float = Field(1.2, ge=0)  # of steps that it measures at start-up; 0: none
    drain_timeout: float = Field(30.0, ge=0)  # from SIGTERM until what still runs is left to other workers
    secret_file: Path | None = None  # read at start and at each reload; None: the secret is in the environment
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"  # text on a terminal, else JSON


def keys_of(env: Mapping[str, str], variable: str) -> tuple[str, ...]:
    """Return the keys in a variable: commas part them, and spaces around them are none of theirs."""
    return tuple(key.strip() for key in env.get(variable, "").split(",") if key.strip())


def environment() -> dict[str, str]:
    """Return a copy of the process's environment: nothing else reads it."""
    return dict(os.environ)
