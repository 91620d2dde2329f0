"""Everything that an operator can set: flags, environment variables and YAML keys of kvferry, declared once.

A field is a YAML key; `KVFERRY_` + upper case is its environment variable; `--` + dashes is its flag, where a
command has one. A pool's own values stand under `prefill:` and `decode:`. One file serves every command of a cluster:
each takes what concerns it. Where a value came from and how layers are merged is `settings`' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from ..common.config import (
    Attention,
    AutoscaleMode,
    Checksum,
    CpuIsa,
    Device,
    Dtype,
    KVCacheDtype,
    LoadFormat,
    LogFormat,
    LogLevel,
    PolicyName,
    QuantizationName,
    ReasoningParserName,
    Settings,
    SpecialTokens,
    SpeculativeConfig,
    ToolParserName,
    TransferName,
    UnknownFields,
)
from .values import (
    Classes,
    Count,
    Objective,
    Port,
    Share,
    Texts,
    WeightsForms,
    check_adapters,
    check_origins,
    check_windows,
    on_or_off,
    parse_number,
    parse_object,
)

ENV_PREFIX = "KVFERRY_"

SERVE = ("serve",)
ROUTER = ("router",)
WORKERS = ("prefill", "decode")
ENGINES = SERVE + WORKERS
FRONTS = SERVE + ROUTER
ALL = SERVE + ROUTER + WORKERS


@dataclass(frozen=True, slots=True)
class Option:
    """A setting's looks on the command line: its group, its help (of a switch: what --no- does), who takes it."""

    panel: str
    help: str
    on: tuple[str, ...]
    flag: str = ""  # where it is not the field's name


class PoolSettings(Settings):
    """One pool: how many workers, and what they do not share with the other pool."""

    workers: Annotated[int, Field(ge=0)] = 1
    min_workers: Annotated[int, Field(ge=0)] | None = None  # None: 1, or 0 for a pool that starts with none
    max_workers: Annotated[int, Field(ge=0)] | None = None  # None: what the pools start with, however they share it
    tensor_parallel_size: PositiveInt | None = None
    enable_expert_parallel: bool | None = None
    expert_plan: Path | None = None
    quantization: QuantizationName | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    gpu_memory_utilization: Share | None = None
    kv_cache_memory_bytes: Count | None = None
    enable_prefix_caching: bool | None = None
    attention_backend: Attention | None = None
    num_threads: Count | None = None

    def overrides(self) -> dict[str, object]:
        return self.model_dump(exclude_none=True, exclude={"workers", "min_workers", "max_workers"})


class ServeSettings(Settings):
    """All settings of a deployment, checked against each other."""

    model: Annotated[
        str | None,
        Option(
            "Model", "Directory in Hugging Face's layout, GGUF file or name on its hub. Without one: the built-in.", ALL
        ),
    ] = None
    revision: Annotated[str | None, Option("Model", "Branch, tag or commit on the hub.", ALL)] = None
    served_model_name: Annotated[str | None, Option("Model", "The model's name in the API.", ALL)] = None
    max_model_len: Annotated[
        Count | None, Option("Model", "Longest prompt plus answer, in tokens. Default: the model's.", ALL)
    ] = None
    dtype: Annotated[Dtype, Option("Model", "Type of weights; auto: the checkpoint's.", ENGINES)] = "auto"
    quantization: Annotated[
        QuantizationName | None,
        Option(
            "Model",
            "int8, int4: round a plain checkpoint's weights at start; gguf: the built-in model's as its file has them. "
            "Default: the checkpoint's own.",
            ALL,
        ),
    ] = None
    mixed_quantization: Annotated[
        WeightsForms,
        Option(
            "Model",
            "plain, int8, int4: forms of the weights whose workers may exchange KV, as a plain prefill worker and a "
            "decode worker in int4. Default: all workers have one.",
            ENGINES,
        ),
    ] = ()
    load_format: Annotated[LoadFormat, Option("Model", "dummy: random weights.", ENGINES)] = "auto"
    chat_template: Annotated[Path | None, Option("Model", "Jinja file instead of the model's own.", FRONTS)] = None
    special_tokens_in_messages: Annotated[
        SpecialTokens,
        Option(
            "Model",
            "What a special token is that a message's text spells: itself, ordinary text, or a reason to refuse it.",
            FRONTS,
        ),
    ] = "allow"
    enable_auto_tool_choice: Annotated[
        bool, Option("Model", "Let the model decide whether it calls a tool; off: only where it must.", FRONTS)
    ] = True
    tool_call_parser: Annotated[
        ToolParserName, Option("Model", "Form of the model's tool calls; auto: by the chat template.", FRONTS)
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParserName, Option("Model", "Form of the model's reasoning; auto: by the chat template.", FRONTS)
    ] = "auto"
    seed: Annotated[int, Option("Model", "Seed of dummy weights and of requests without one.", ALL)] = 0

    host: Annotated[str, Option("HTTP", "Address of the API.", FRONTS)] = "127.0.0.1"
    port: Annotated[Port, Option("HTTP", "Port of the API; 0: any free one.", FRONTS)] = 8000
    api_key_file: Annotated[
        Path | None,
        Option("HTTP", "File of keys that clients must send (kvferry keys); read again on a reload.", FRONTS),
    ] = None
    api_key: Annotated[Texts, Option("HTTP", "Key that clients must send; repeatable.", FRONTS)] = ()
    allowed_hosts: Annotated[
        Texts,
        Option("HTTP", "Name by which clients reach a server without keys, as through a proxy; repeatable.", FRONTS),
    ] = ()
    allowed_origins: Annotated[
        Annotated[Texts, AfterValidator(check_origins)],
        Option("HTTP", "Origin of web pages that may ask; *: any, with API keys. Repeatable. Default: none.", FRONTS),
    ] = ()

    unknown_fields: Annotated[
        UnknownFields, Option("HTTP", "Unknown fields in a request; warn: ignored, and the answer says so.", FRONTS)
    ] = "refuse"

    max_connections: Annotated[
        Count | None,
        Option("HTTP", "Clients' connections at once. Default: 4096, or what open files allow.", FRONTS),
    ] = None
    max_connections_per_address: Annotated[
        Count, Option("HTTP", "Of these, from one address (of IPv6: one /64).", FRONTS)
    ] = 1024
    max_concurrency_per_key: Annotated[
        Count | None, Option("HTTP", "Requests of one API key at once. Default: no limit.", FRONTS)
    ] = None
    requests_per_minute_per_key: Annotated[
        Count | None, Option("HTTP", "Requests of one API key a minute. Default: no limit.", FRONTS)
    ] = None
    tokens_per_minute_per_key: Annotated[
        Count | None,
        Option("HTTP", "Tokens of one API key a minute, prompts and answers. Default: no limit.", FRONTS),
    ] = None
    share_prefix_cache: Annotated[
        bool, Option("HTTP", "Let API keys reuse the KV of each other's equal prompt beginnings.", FRONTS)
    ] = False
    admin_port: Annotated[
        Port | None, Option("HTTP", "Port of the admin listener; 0: any free one. Default: none.", FRONTS)
    ] = None
    admin_host: Annotated[str, Option("HTTP", "Address of the admin listener.", FRONTS)] = "127.0.0.1"
    admin_key_file: Annotated[
        Path | None, Option("HTTP", "File of keys of the admin listener; read again on a reload.", FRONTS)
    ] = None
    admin_key: Annotated[Texts, Option("HTTP", "Key of the admin listener; repeatable.", FRONTS)] = ()
    routers: Annotated[PositiveInt, Option("HTTP", "Router processes behind the one address.", SERVE)] = 1
    drain_timeout: Annotated[
        Annotated[float, Field(ge=0, le=86400)],
        Option("HTTP", "Seconds that running answers get after SIGTERM.", ALL),
    ] = 30.0

    data_dir: Annotated[
        Path | None,
        Option(
            "Batches",
            "Folder for /v1/files and /v1/batches, which survive a restart in it. Default: none, both are refused.",
            FRONTS,
        ),
    ] = None
    data_dir_bytes: Annotated[
        Count, Option("Batches", "What the files there may take together; more is refused.", FRONTS)
    ] = 10 << 30
    data_retention_days: Annotated[
        Annotated[float, Field(gt=0, le=3650)],
        Option("Batches", "Days that files and ended batches are kept.", FRONTS),
    ] = 30.0
    max_batch_requests: Annotated[Count, Option("Batches", "Requests of batches at once, of each router.", FRONTS)] = 16
    batch_requests_beside: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)],
        Option("Batches", "Of these, beside other requests; 0: batches wait while anybody else is served.", FRONTS),
    ] = 0

    prefill: Annotated[PoolSettings, Option("Pools", "Prefill workers; 0: decode workers do both.", FRONTS)] = (
        PoolSettings()
    )
    decode: Annotated[PoolSettings, Option("Pools", "Decode workers.", SERVE)] = PoolSettings()
    max_local_prefill_tokens: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)],
        Option("Pools", "Prompts with at most so many uncached tokens stay on the decode worker.", FRONTS),
    ] = 0
    local_prefill: Annotated[bool, Option("Pools", "Never compute a prompt on a decode worker.", FRONTS)] = True

    policy: Annotated[PolicyName, Option("Objectives", "Who decides where a request runs.", FRONTS)] = "slo"
    ttft_objective_ms: Annotated[
        Objective,
        Option(
            "Objectives",
            "Time to the first token; what would wait longer is refused at once (429). Default: all wait.",
            FRONTS,
        ),
    ] = None
    ttft_stretch: Annotated[
        Annotated[float, Field(ge=1)],
        Option("Objectives", "A long prompt may take so many times its time on empty workers instead.", FRONTS),
    ] = 3.0
    tpot_objective_ms: Annotated[
        Objective, Option("Objectives", "Mean time per token after the first. Default: none.", ALL)
    ] = None
    classes: Annotated[
        Classes,
        Option(
            "Objectives",
            "A class that requests name by header x-request-class: NAME:KEY=VALUE,KEY=VALUE with ttft_objective_ms, "
            "ttft_stretch, tpot_objective_ms, priority, deadline_s or weight. Repeatable.",
            FRONTS,
        ),
    ] = ()
    explain: Annotated[
        bool, Option("Objectives", "Keep every placement's candidates for /admin/requests, not some's.", FRONTS)
    ] = False

    autoscale: Annotated[
        Annotated[AutoscaleMode, BeforeValidator(on_or_off)],
        Option("Pools", "Let pools grow, shrink and lend each other workers; advise: only say so.", FRONTS),
    ] = "off"
    spare_workers: Annotated[
        Annotated[int, Field(ge=0)], Option("Pools", "Ready workers beyond what the load needs.", FRONTS)
    ] = 0
    scale_schedule: Annotated[
        Annotated[Texts, AfterValidator(check_windows)],
        Option("Pools", "Other bounds at a time: 'mon-fri 08:00-18:00 prefill>=4 decode>=2'; repeatable.", FRONTS),
    ] = ()
    scale_target: Annotated[
        Annotated[float, Field(gt=0.5, lt=1)],
        Option("Pools", "Share of requests that are to meet each objective.", FRONTS),
    ] = 0.99
    scale_interval: Annotated[
        Annotated[float, Field(gt=0)], Option("Pools", "Seconds between two decisions.", FRONTS)
    ] = 5.0
    scale_down_after: Annotated[
        Annotated[float, Field(ge=0)],
        Option("Pools", "Seconds for which fewer workers must have been enough.", FRONTS),
    ] = 300.0
    role_change_after: Annotated[
        Annotated[float, Field(ge=0)], Option("Pools", "The same, before a pool lends the other a worker.", FRONTS)
    ] = 15.0

    device: Annotated[Device, Option("Engine", "auto: GPUs where there are any.", ENGINES)] = "auto"
    tensor_parallel_size: Annotated[PositiveInt, Option("Engine", "Ranks of one worker.", ENGINES)] = 1
    enable_expert_parallel: Annotated[
        bool,
        Option("Engine", "Give each rank of a worker whole experts instead of a part of each.", ENGINES),
    ] = False
    expert_plan: Annotated[
        Path | None, Option("Engine", "File that says which ones (kvferry experts plan). Default: even.", ENGINES)
    ] = None
    block_size: Annotated[
        Annotated[Literal[8, 16, 32, 64, 128], BeforeValidator(parse_number)],
        Option("Engine", "Tokens in a KV block.", ENGINES),
    ] = 16
    max_num_seqs: Annotated[Count, Option("Engine", "Sequences in one step.", ENGINES)] = 64
    max_num_batched_tokens: Annotated[
        Count | None,
        Option("Engine", "Tokens in one step. Default: 512 on CPUs; on GPUs 8K (prefill) or 2K (decode).", ENGINES),
    ] = None
    gpu_memory_utilization: Annotated[Share, Option("Engine", "Share of a GPU's memory to use.", ENGINES)] = 0.9
    kv_cache_memory_bytes: Annotated[
        Count | None, Option("Engine", "KV cache of one rank (2GiB, 512MiB). Default: from free memory.", ENGINES)
    ] = None
    swap_space: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)] | None,
        Option(
            "Engine",
            "Host memory of a decode rank for preempted KV; 0: none. Default: a tenth of the KV cache; on GPUs 4GiB.",
            (*SERVE, "decode"),
        ),
    ] = None
    host_cache_memory_bytes: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)] | None,
        Option(
            "Engine",
            "Host memory of a rank for cached KV that its GPU evicts; 0: none. Default: 8GiB, at most a tenth of what "
            "is free; on CPUs only what --disk-cache-dir needs.",
            ENGINES,
        ),
    ] = None
    disk_cache_dir: Annotated[
        Path | None,
        Option("Engine", "Directory on a local disk for cached KV that host memory evicts. Default: none.", ENGINES),
    ] = None
    disk_cache_bytes: Annotated[Count, Option("Engine", "Room that a rank takes there.", ENGINES)] = 10 << 30
    enable_prefix_caching: Annotated[
        bool, Option("Engine", "Do not reuse the KV of equal prompt beginnings.", ENGINES)
    ] = True
    kv_cache_dtype: Annotated[
        KVCacheDtype, Option("Engine", "Type of cached keys and values; fp8: half the bytes, on GPUs.", ENGINES)
    ] = "auto"
    attention_backend: Annotated[
        Attention,
        Option("Engine", "Kernels; flashinfer_fp8: prompts' queries in 8 bits too, over fp8 keys, on Hopper.", ENGINES),
    ] = "auto"
    cpu_isa: Annotated[
        CpuIsa, Option("Engine", "Instruction set of the C++ on CPUs; auto: the processor's best.", ENGINES)
    ] = "auto"
    deterministic: Annotated[
        bool,
        Option(
            "Engine",
            "A request's tokens and log-probabilities are the same to the bit whatever runs beside it, however it is "
            "cut, cached, moved or resumed. On CPUs alone.",
            ALL,
        ),
    ] = False
    speculative_config: Annotated[
        Annotated[SpeculativeConfig, BeforeValidator(parse_object)] | None,
        Option(
            "Engine",
            "Draft tokens and check several in a step; none is another than without. JSON as vLLM takes it: "
            '{"method": "ngram", "num_speculative_tokens": 5}, or "draft_model" with "model": DIRECTORY. Turns '
            "deterministic on. On CPUs alone.",
            ENGINES,
        ),
    ] = None
    enable_lora: Annotated[
        bool, Option("Adapters", "Serve adapters (LoRA) beside the model, each under a name of its own.", ALL)
    ] = False
    lora_modules: Annotated[
        Annotated[Texts, AfterValidator(check_adapters)],
        Option("Adapters", "NAME=DIRECTORY of an adapter as peft saves it, served from the start; several.", FRONTS),
    ] = ()
    max_loras: Annotated[int, Field(ge=1, le=1024), Option("Adapters", "Adapters in a step at once.", ENGINES)] = 8
    max_lora_rank: Annotated[
        int,
        Field(ge=1, le=256),
        Option("Adapters", "Largest rank that is served; memory is set aside for it.", ALL),
    ] = 16
    max_cpu_loras: Annotated[
        Count | None, Option("Adapters", "Adapters kept in a worker's host memory. Default: max_loras.", ENGINES)
    ] = None
    allow_runtime_lora_updating: Annotated[
        bool,
        Option("Adapters", "Let clients load and unload adapters; without it, the admin listener alone does.", FRONTS),
    ] = False
    enforce_eager: Annotated[
        bool, Option("Engine", "No CUDA graphs: decode steps launch every kernel from Python.", ENGINES)
    ] = False
    num_threads: Annotated[
        Count | None,
        Option(
            "Engine", "CPU threads of a rank. Default: its part of the cores, and the cores of idle workers.", ENGINES
        ),
    ] = None

    transfer: Annotated[TransferName, Option("Cluster", "What moves KV between workers.", ENGINES)] = "nixl"
    kv_checksum: Annotated[
        Checksum, Option("Cluster", "Check shipped blocks before use; auto: in host memory, not on GPUs.", ENGINES)
    ] = "auto"
    launcher: Annotated[Literal["local", "ray"], Option("Cluster", "Processes here, or actors on Ray.", SERVE)] = (
        "local"
    )
    ray_address: Annotated[
        str | None, Option("Cluster", "A running Ray cluster; without one, one is embedded.", SERVE)
    ] = None
    secret_file: Annotated[
        Path | None,
        Option("Cluster", "File with the secret that router and workers share; a second line is believed too.", ALL),
    ] = None
    insecure_loopback: Annotated[
        bool,
        Option("Cluster", "Do without a secret: every process of this machine may join.", ROUTER + WORKERS),
    ] = False
    control_host: Annotated[str, Option("Cluster", "Address of the socket for workers.", ROUTER)] = "127.0.0.1"
    control_port: Annotated[Port, Option("Cluster", "Port of that socket.", ROUTER)] = 7001
    router: Annotated[Texts, Option("Cluster", "host:port of a router's control socket; repeatable.", WORKERS)] = ()
    handoff_host: Annotated[
        str, Option("Cluster", "Address of this worker for other workers.", WORKERS, flag="host")
    ] = "127.0.0.1"
    handoff_port: Annotated[Port, Option("Cluster", "Port of it; 0: any free one.", WORKERS, flag="port")] = 0
    worker_id: Annotated[
        str | None, Option("Cluster", "Name of this worker in logs and metrics. Default: host and process id.", WORKERS)
    ] = None

    log_level: Annotated[LogLevel, Option("Output", "Least severe lines to log.", ALL)] = "info"
    log_format: Annotated[
        LogFormat, Option("Output", "Log lines for people or programs; auto: text on a terminal.", ALL)
    ] = "auto"
    pid_file: Annotated[
        Path | None,
        Option("Output", "File for this process's id while it runs: kvferry status --pid-file FILE.", SERVE),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: object) -> object:
        """Drafts change no token only where a token's results do not depend on how many are computed at once."""
        if isinstance(values, dict) and values.get("speculative_config") is not None:
            return {"deterministic": True, **values}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._check_keys()
        self._check_pools()
        self._check_classes()
        self._check_forms_of_weights()
        self._check_deterministic()
        self._check_adapters()
        if self.ray_address is not None and self.launcher != "ray":
            raise ValueError("ray_address: only with --launcher ray")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError("max_model_len: must hold a prompt token and an answer token, so at least 2")
        return self

    def _check_keys(self) -> None:
        for name, keys in (("api_key", self.api_key), ("admin_key", self.admin_key)):
            if any("," in key or key != key.strip() or not key for key in keys):
                raise ValueError(f"{name}: a key has at least one character, no comma and no space around it")

    def _check_pools(self) -> None:
        for name, pool in (("prefill", self.prefill), ("decode", self.decode)):
            low, high = pool.min_workers or 0, pool.workers if pool.max_workers is None else pool.max_workers
            if not low <= pool.workers <= high:
                raise ValueError(
                    f"{name}: {pool.workers} workers are not between its min_workers {low} and its max_workers {high}"
                )
        if self.decode.min_workers == 0:
            raise ValueError("decode: at least one decode worker is needed; give --decode-min 1")
        if self.decode.workers < 1:
            raise ValueError("decode: at least one decode worker is needed; for one pool that does both: --prefill 0")
        if self.prefill.workers == 0 and not self.local_prefill:
            raise ValueError("local_prefill: without prefill workers every prompt is local; give --prefill 1")

    def _check_classes(self) -> None:
        names = [known.name for known in self.classes]
        if "default" in names:
            raise ValueError("classes: 'default' is what the other settings of objectives describe")
        if len(set(names)) < len(names):
            raise ValueError("classes: each name once")

    def _check_forms_of_weights(self) -> None:
        forms = [pool.quantization or self.quantization or "plain" for pool in (self.prefill, self.decode)]
        if self.prefill.workers and forms[0] != forms[1] and not set(forms) <= set(self.mixed_quantization):
            given = "decode" if self.decode.quantization is not None else "prefill"
            raise ValueError(
                f"{given}.quantization: prefill workers have {forms[0]} weights, decode workers {forms[1]}: they "
                f"compute other numbers; where that is accepted, give --mixed-quantization {forms[0]},{forms[1]}"
            )
        if self.mixed_quantization and self.deterministic:
            raise ValueError("mixed_quantization: not with deterministic: equal requests would have other answers")

    def _check_deterministic(self) -> None:
        pools = (self.prefill, self.decode)
        sizes = [pool.tensor_parallel_size or self.tensor_parallel_size for pool in pools]
        splits = {
            self.enable_expert_parallel if pool.enable_expert_parallel is None else pool.enable_expert_parallel
            for pool in pools
        }
        plans = {pool.expert_plan or self.expert_plan for pool in pools}
        if self.deterministic and self.prefill.workers and sizes[0] != sizes[1]:
            raise ValueError(
                f"deterministic: both pools need the same tensor_parallel_size, these have {sizes[0]} and {sizes[1]}: "
                "sums over ranks are rounded as they are split"
            )
        if self.deterministic and self.prefill.workers and max(sizes) > 1 and max(len(splits), len(plans)) > 1:
            name = "enable_expert_parallel" if len(splits) > 1 else "expert_plan"
            raise ValueError(f"deterministic: both pools need the same {name}: sums are rounded as split")
        if self.speculative_config is not None and not self.deterministic:
            raise ValueError("speculative_config: needs deterministic, which is turned off: leave that away")
        if self.speculative_config is not None and self.speculative_config.model is not None and max(sizes) > 1:
            raise ValueError("speculative_config: a draft model needs tensor_parallel_size 1")

    def _check_adapters(self) -> None:
        if self.lora_modules and not self.enable_lora:
            raise ValueError("lora_modules: needs enable_lora")
        if self.allow_runtime_lora_updating and self.routers > 1:
            raise ValueError("allow_runtime_lora_updating: with one router; of several only the asked one would know")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras: at least max_loras, which is {self.max_loras}")


def option_of(field_name: str) -> Option:
    """Return the `Option` that a field of ServeSettings carries."""
    return next(item for item in ServeSettings.model_fields[field_name].metadata if isinstance(item, Option))


def setting_keys() -> dict[str, str]:
    """Name (in flags and environment) to dotted key (in YAML): `prefill_max_num_seqs` to `prefill.max_num_seqs`."""
    keys: dict[str, str] = {}
    for name in ServeSettings.model_fields:
        if name in ("prefill", "decode"):
            keys[name] = f"{name}.workers"
            keys |= {f"{name}_{own}": f"{name}.{own}" for own in PoolSettings.model_fields if own != "workers"}
        else:
            keys[name] = name
    return keys
