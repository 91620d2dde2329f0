"""`RouterConfig` says what a router process is told: where it listens, whom it believes, how it places and scales."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from .config import LogFormat, LogLevel, QuantizationName, Settings

PolicyName = Literal["slo", "least_loaded", "kv_cost", "round_robin"]
SpecialTokens = Literal["allow", "text", "refuse"]
UnknownFields = Literal["refuse", "warn"]
ToolParserName = Literal[
    "auto", "hermes", "llama3_json", "llama4_json", "mistral", "qwen3_coder", "qwen3_xml", "deepseek_v3",
    "deepseek_v31", "granite", "granite4", "phi4_mini_json", "pythonic", "olmo3", "llama4_pythonic", "openai", "json",
    "glm45", "glm47", "minimax_m2", "seed_oss", "lfm2", "hunyuan_a13b", "cohere_command3", "nemotron_json", "gemma4",
]  # vLLM's names, where it has one  # fmt: skip
ReasoningParserName = Literal[
    "auto", "none", "think", "qwen3", "deepseek_r1", "mistral", "openai_gptoss", "glm45", "minimax_m2", "seed_oss",
    "hunyuan_a13b", "cohere_command3", "nemotron_v3", "gemma4",
]  # fmt: skip
AutoscaleMode = Literal["off", "advise", "on"]


class RequestClass(Settings):
    """Objectives and rank of the requests that name this class (header x-request-class)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    ttft_objective_ms: float | None = Field(None, gt=0)  # to the first token; None: none
    ttft_stretch: float | None = Field(None, ge=1)  # None: the router's
    tpot_objective_ms: float | None = Field(None, gt=0)  # mean per token after the first
    priority: int = Field(0, ge=-(2**31), lt=2**31)  # lower first; of requests that say none
    deadline_s: float | None = Field(None, gt=0, le=86400)  # for the whole answer
    weight: float = Field(1.0, ge=0.01, le=100)  # of a tenant's share


def strictest_tpot_ms(default_ms: float | None, classes: Iterable[RequestClass]) -> float | None:
    """Return the shortest objective for a time per token that any request may have; None: none has one."""
    known = (default_ms, *(each.tpot_objective_ms for each in classes))
    return min((objective_ms for objective_ms in known if objective_ms is not None), default=None)


class PoolBounds(Settings):
    """Bounds of a pool's number of workers."""

    at_least: int = Field(ge=0)
    at_most: int = Field(ge=0)


class AutoscaleConfig(Settings):
    """Settings by which pools grow, shrink and lend workers (router/autoscaler/autoscaler.py). Times in seconds."""

    mode: AutoscaleMode = "off"
    prefill: PoolBounds = PoolBounds(at_least=1, at_most=1)
    decode: PoolBounds = PoolBounds(at_least=1, at_most=1)
    max_workers: PositiveInt = 2  # of both pools
    spare_workers: int = Field(0, ge=0)
    scale_schedule: tuple[str, ...] = ()
    scale_target: float = Field(0.99, gt=0.5, lt=1)
    scale_interval: float = Field(5.0, gt=0)
    scale_down_after: float = Field(300.0, ge=0)
    role_change_after: float = Field(15.0, ge=0)


class RouterConfig(Settings):
    """The router process."""

    host: str = "127.0.0.1"
    port: int = 8000
    control_host: str = "127.0.0.1"
    control_port: int = 0  # 0: any free port
    model_dir: Path
    served_model_name: str
    model_aliases: tuple[str, ...] = ()  # further names by which requests may ask for the model
    quantization: QuantizationName | None = None  # as the workers': answers to /v1/models say so
    max_model_len: PositiveInt | None = None
    chat_template: Path | None = None
    special_tokens_in_messages: SpecialTokens = "allow"  # as what they are, as ordinary text, or not at all
    enable_auto_tool_choice: bool = True  # False: tool_choice "auto" is refused
    tool_call_parser: ToolParserName = "auto"  # auto: by the chat template
    reasoning_parser: ReasoningParserName = "auto"
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None  # further keys; read at start and at each reload
    ssl_certfile: Path | None = None  # a chain in PEM: clients come by TLS. None: plain HTTP
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None  # clients show a certificate of one of these authorities
    secret_file: Path | None = None  # as a worker's
    local_prefill: bool = True  # False (--no-local-prefill): a prompt is never computed on a decode worker
    max_local_prefill_tokens: int = Field(0, ge=0)
    expect_prefill: bool = True  # False: no prefill pool is configured (colocated), decode workers compute prompts
    deterministic: bool = False  # as the workers: answers say so
    allowed_hosts: tuple[str, ...] = ()  # names of a server without keys, besides its addresses
    allowed_origins: tuple[str, ...] = ()  # web pages that may ask; *: all, with keys only
    unknown_fields: UnknownFields = "refuse"  # of a request's body; warn: the answer names them
    max_connections: PositiveInt | None = None  # None: 4096, or what the limit of open files allows
    max_connections_per_address: PositiveInt = 1024  # of IPv6: per /64
    answers_dir: Path | None = None  # where answers with a key are kept, and responses; None: in no file
    store_responses: bool = True  # of /v1/responses, for who goes on with them
    data_dir: Path | None = None  # of /v1/files and /v1/batches; None: both are refused
    data_dir_bytes: PositiveInt = 10 << 30  # that all files in it may take together
    data_retention_days: float = Field(30.0, gt=0, le=3650)  # of files and ended batches
    max_batch_requests: PositiveInt = 16  # of all batches at once
    batch_requests_beside: int = Field(0, ge=0)  # while somebody else is served
    share_prefix_cache: bool = False  # between API keys
    max_concurrency_per_key: PositiveInt | None = None  # None: no limit
    requests_per_minute_per_key: PositiveInt | None = None
    tokens_per_minute_per_key: PositiveInt | None = None
    quota_board: Path | None = None  # where a launcher's routers count together (settings/quota_board.py)
    policy: PolicyName = "slo"
    max_queue: PositiveInt = 4096  # requests waiting in the router
    max_attempts: PositiveInt = 5
    ttft_objective_ms: float | None = Field(None, gt=0)  # requests that cannot make it are refused; None: all wait
    ttft_stretch: float = Field(3.0, ge=1)  # a long prompt may take so many times what it takes on empty workers
    tpot_objective_ms: float | None = Field(None, gt=0)
    classes: tuple[RequestClass, ...] = ()  # besides the one of requests that name none
    explain: bool = False  # keep the candidates of every placement, not only of some
    drain_timeout: float = Field(30.0, ge=0)  # from SIGTERM until running answers are told an error
    enable_lora: bool = False  # as the workers'
    lora_modules: tuple[str, ...] = ()  # name=path of adapters that are served from the start
    max_lora_rank: int = Field(16, ge=1, le=256)  # as the workers'
    allow_runtime_lora_updating: bool = False  # clients may load and unload adapters, not only operators
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # None: no admin listener; 0: any free port
    admin_key: tuple[str, ...] = ()
    admin_key_file: Path | None = None
    autoscale: AutoscaleConfig = AutoscaleConfig()
    seed: int = 0
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"  # text on a terminal, else JSON

    @property
    def needs_api_keys(self) -> bool:
        return bool(self.api_key) or self.api_key_file is not None
