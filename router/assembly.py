"""A router's parts, made from its configuration: the one place that knows which models there are.

    the model's directory ─> tokenizer, limits, defaults ─> version ─> catalogue ─> application
    policy, predictor ─> dispatcher ───────────────────────────┘  └─> scaling

Today there is one version, its workers are those of the deployment, and what is counted is counted for its model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from .. import __version__
from ..common.clock import Clock, SystemClock, wall_time_us, week_s
from ..common.errors import ConfigError
from ..common.router_config import RouterConfig
from ..models.config import ModelConfig
from ..models.pooling import read_embedded_texts, read_pooling
from ..models.quantization import chosen_quantization
from ..models.tokenizer import Tokenizer
from ..settings.quota_board import QuotaBoard
from .access.keys import ApiKeys
from .access.quota import QuotaLimits
from .access.reload import LauncherLink
from .access.shared_accounts import SharedAccounts
from .app import Application, build_app
from .autoscaler.load_record import LoadRecord, RecordingMetrics
from .autoscaler.scaling import Scaling
from .batches.folder import DataFolder
from .catalogue.adapters import AdapterNames
from .catalogue.catalogue import Catalogue
from .catalogue.defaults import SamplingDefaults
from .catalogue.version import ServedModel, Version
from .dispatch.dispatcher import Dispatcher
from .dispatch.worker_group import Expected
from .helpers.grammar_checker import GrammarCompilers
from .kept.answers import KeptAnswers
from .metrics.metrics import RouterMetrics
from .placement import make_policy
from .state.classes import RequestClasses
from .state.failures import WorkerLife
from .state.objectives import BACKGROUND_CLASS, DEFAULT_CLASS
from .state.predictor import Predictor

log = structlog.get_logger(__name__)


@dataclass(slots=True, frozen=True)
class RouterParts:
    """The parts of a router process that do not listen."""

    catalogue: Catalogue
    app: Application
    metrics: RouterMetrics
    scaling: Scaling
    clock: Clock
    adapters: AdapterNames | None  # None: none are served

    def scrape(self) -> Callable[[], tuple[bytes, str]]:
        """Return what writes (text, media type) of the metrics, on a thread."""
        return self.metrics.scrape(self.catalogue.views(), num_in_flight=len(self.app.api.in_flight))


async def assemble(config: RouterConfig, keys: ApiKeys, launcher: LauncherLink | None) -> RouterParts:
    """Raises ConfigError for a model that cannot be served."""
    model, tokenizer, grammars = await asyncio.to_thread(_load_model, config)
    clock, predictor = SystemClock(), Predictor()
    record, classes = LoadRecord(), RequestClasses.from_config(config)
    names = classes.names if config.data_dir is None else (*classes.names, BACKGROUND_CLASS)
    metrics = RecordingMetrics(model.name, record, names)
    dispatcher = Dispatcher(
        config,
        make_policy(config, predictor),
        clock,
        metrics,
        time_us=wall_time_us,
        predictor=predictor,
        on_blameless=partial(_tell_blameless, launcher),
    )
    scaling = Scaling(
        config.autoscale,
        classes.named(DEFAULT_CLASS),
        dispatcher,
        predictor,
        record,
        clock,
        week_s,
        launcher=launcher.send if launcher is not None else None,
    )
    metrics.replicas = scaling.replicas
    expected = Expected(__version__, model.name, config.max_model_len, config.deterministic)
    catalogue = Catalogue([Version.create(model, tokenizer, dispatcher, expected, grammars=grammars)])
    for alias in config.model_aliases:
        catalogue.add_alias(alias, model.name)
    adapters = await asyncio.to_thread(_load_adapters, config, catalogue) if config.enable_lora else None
    app = _application(config, catalogue, metrics, clock, keys, classes, adapters)
    return RouterParts(catalogue, app, metrics, scaling, clock, adapters)


def _load_adapters(config: RouterConfig, catalogue: Catalogue) -> AdapterNames:
    """Read those that are served from the start. Raises ConfigError."""
    adapters = AdapterNames(catalogue, ModelConfig.from_dir(config.model_dir), config.max_lora_rank)
    for text in config.lora_modules:
        name, _, path = text.partition("=")
        try:
            adapters.add(name, path)
        except ConfigError as error:
            raise ConfigError(f"lora_modules: {name}: {error}") from error
    return adapters


def _load_model(config: RouterConfig) -> tuple[ServedModel, Tokenizer, GrammarCompilers]:
    """Return the model as the router reads it from its directory."""
    model_config = ModelConfig.from_dir(config.model_dir)
    quantization = chosen_quantization(model_config.quantization, config.quantization)
    tokenizer = Tokenizer.from_dir(config.model_dir, config.chat_template)
    model = ServedModel(
        name=config.served_model_name,
        quantization=quantization.name if quantization is not None else "",
        max_model_len=config.max_model_len or model_config.max_model_len,
        vocab_size=model_config.vocab_size,
        generates=model_config.has_head,
        hidden_size=model_config.hidden_size,
        pooling=read_pooling(config.model_dir),
        embedded_texts=read_embedded_texts(config.model_dir),
        defaults=SamplingDefaults.from_dir(config.model_dir),
        deterministic=config.deterministic,
        special_tokens=config.special_tokens_in_messages,
        chooses_tools=config.enable_auto_tool_choice,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    grammars = GrammarCompilers(config.model_dir, model_config.vocab_size, model_config.eos_token_ids)
    return model, tokenizer, grammars


def _shared_accounts(path: Path | None, limits: QuotaLimits, clock: Clock) -> SharedAccounts | None:
    """Return None where this router counts for itself."""
    if path is None:
        return None
    try:
        return SharedAccounts(QuotaBoard.open(path), limits, clock)
    except OSError as error:
        log.warning("shared_quotas", used=False, reason=f"{path}: {error.strerror or error}")
        return None


def _application(
    config: RouterConfig,
    catalogue: Catalogue,
    metrics: RouterMetrics,
    clock: Clock,
    keys: ApiKeys,
    classes: RequestClasses,
    adapters: AdapterNames | None,
) -> Application:
    limits = QuotaLimits(
        config.max_concurrency_per_key, config.requests_per_minute_per_key, config.tokens_per_minute_per_key
    )
    return build_app(
        catalogue,
        metrics,
        keys=keys,
        clock=clock,
        seed=config.seed,
        quota=limits,
        accounts=_shared_accounts(config.quota_board, limits, clock),
        share_prefix_cache=config.share_prefix_cache,
        classes=classes,
        allowed_hosts=(config.host, *config.allowed_hosts) if not config.needs_api_keys else config.allowed_hosts,
        allowed_origins=config.allowed_origins,
        unknown_fields=config.unknown_fields,
        data=_data_folder(config),
        max_batch_requests=config.max_batch_requests,
        kept_answers=None if config.answers_dir is None else KeptAnswers(config.answers_dir),
        stores_responses=config.store_responses,
        adapters=adapters if config.allow_runtime_lora_updating else None,
    )


def _data_folder(config: RouterConfig) -> DataFolder | None:
    """Raises ConfigError for a folder that cannot be used."""
    if config.data_dir is None:
        return None
    return DataFolder(config.data_dir, max_bytes=config.data_dir_bytes, retention_s=config.data_retention_days * 86400)


def _tell_blameless(launcher: LauncherLink | None, life: WorkerLife) -> None:
    if launcher is not None:
        worker_id, incarnation = life
        launcher.send({"event": "blameless", "worker_id": worker_id, "incarnation": incarnation})
