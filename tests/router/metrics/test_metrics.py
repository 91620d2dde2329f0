"""The router's metrics: names that boards read, closed label sets, gauges from heartbeats."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvferry.common.request import SamplingParams
from kvferry.router.metrics import metrics as metrics_module
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.state.expert_load import ExpertLoad
from kvferry.wire.workers import ExpertCounts, TransferReport, WorkerStatus

VLLM = {"model_name": "m", "engine": "router"}  # labels of what the router counts itself


@dataclass
class _Request:
    timestamps: dict[str, float] = field(default_factory=dict)
    n: int = 1
    sampling: SamplingParams = SamplingParams(max_tokens=40)
    num_prompt_tokens: int = 1200
    num_output_tokens: int = 11
    num_longest_tokens: int = 8
    num_cached_tokens: int = 4
    embedding: bytes = b""
    is_background: bool = False


@dataclass
class _Worker:
    worker_id: str
    role: str
    status: WorkerStatus | None
    is_ready: bool = True
    expert_load: ExpertLoad | None = None


@dataclass
class _View:
    workers: tuple[_Worker, ...] = ()
    block_size: int = 32
    num_queued: int = 0
    queued_by_class: dict[str, int] = field(default_factory=dict)


def _status(**fields: object) -> WorkerStatus:
    values: dict[str, object] = {
        "seq": 1, "state": "ready", "num_running": 3, "num_waiting": 2, "waiting_tokens": 50, "num_free_blocks": 40,
        "num_cached_blocks": 30, "num_granted_blocks": 5, "num_quarantined_blocks": 1, "num_blocks": 100, "steps": 9,
        "busy_for_s": 0.0, "num_preemptions": 7, "prefix_queries": 200, "prefix_hits": 80, **fields,
    }  # fmt: skip
    return WorkerStatus(**values)  # type: ignore[arg-type]


def _samples(metrics: RouterMetrics, view: _View | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, media_type = metrics.scrape([("m", view or _View())], num_in_flight=0)()
    assert media_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def _key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def _finished(metrics: RouterMetrics, *, is_background: bool = False) -> None:
    stamps = {"queued": 1.0, "prefill_start": 1.5, "first_token": 3.0, "last_token": 4.0, "finished": 4.1}
    metrics.on_finished(_Request(stamps, num_longest_tokens=11, is_background=is_background))


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("time_to_first_token_seconds", 2.0),
        ("request_queue_time_seconds", 0.5),
        ("request_prefill_time_seconds", 1.5),
        ("request_decode_time_seconds", 1.0),
        ("request_inference_time_seconds", 2.5),
        ("e2e_request_latency_seconds", 3.1),
        ("time_per_output_token_seconds", 0.1),
    ],
)
def test_latencies_are_differences_of_a_requests_stamps(name: str, seconds: float) -> None:
    metrics = RouterMetrics("m")
    _finished(metrics)
    _finished(metrics, is_background=True)  # nobody waited
    samples = _samples(metrics)
    assert samples[_key(f"kvferry_{name}_sum")] == pytest.approx(seconds)
    assert samples[_key(f"vllm:{name}_sum", **VLLM)] == pytest.approx(seconds)
    assert samples[_key(f"vllm:{name}_count", **VLLM)] == 1
    assert samples[_key(f"vllm:{name}_bucket", **VLLM, le="+Inf")] == 1


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("request_prompt_tokens", 1200),
        ("request_generation_tokens", 11),
        ("request_max_num_generation_tokens", 8),
        ("request_params_max_tokens", 40),
        ("request_params_n", 3),
    ],
)
def test_lengths_are_a_requests(name: str, number: int) -> None:
    metrics = RouterMetrics("m")
    metrics.on_finished(_Request(n=3))
    metrics.on_finished(_Request(n=3, is_background=True))
    samples = _samples(metrics)
    assert samples[_key(f"kvferry_{name}_sum")] == samples[_key(f"vllm:{name}_sum", **VLLM)] == 2 * number
    metrics.on_finished(_Request(embedding=b"1"))
    has_prompt = name == "request_prompt_tokens"
    assert _samples(metrics)[_key(f"kvferry_{name}_count")] == 2 + has_prompt, "an embedding has no answer"


def test_time_per_token_is_that_of_the_longest_choice() -> None:
    metrics = RouterMetrics("m")
    metrics.on_finished(
        _Request({"first_token": 3.0, "last_token": 9.0}, n=2, num_output_tokens=102, num_longest_tokens=101)
    )
    metrics.on_finished(_Request({"first_token": 3.0, "last_token": 3.0}, num_longest_tokens=1))  # none after the first
    samples = _samples(metrics)
    for name, labels in (
        ("kvferry_time_per_output_token_seconds", {}),
        ("vllm:time_per_output_token_seconds", VLLM),
        ("vllm:request_time_per_output_token_seconds", VLLM),
    ):
        assert samples[_key(f"{name}_sum", **labels)] == pytest.approx(0.06)
        assert samples[_key(f"{name}_count", **labels)] == 1


def test_a_gateways_picker_finds_the_caches_sizes() -> None:
    view = _View((_Worker("d-0", "decode", _status()), _Worker("d-1", "decode", None)))
    samples = _samples(RouterMetrics("m"), view)
    found = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert found == [{"model_name": "m", "engine": "d-0", "block_size": "32", "num_gpu_blocks": "100"}]


def test_a_request_that_never_ran_has_no_latencies() -> None:
    metrics = RouterMetrics("m")
    metrics.on_finished(_Request({"queued": 1.0, "finished": 2.0}, num_output_tokens=0))
    samples = _samples(metrics)
    assert samples[_key("kvferry_time_to_first_token_seconds_count")] == 0
    assert samples[_key("kvferry_e2e_request_latency_seconds_count")] == 0


def test_gaps_between_tokens_fill_a_histogram() -> None:
    metrics = RouterMetrics("m")
    for gap in (0.001, 0.03, 0.03, 99.0):
        metrics.on_token_gap(gap)
    samples = _samples(metrics)
    for prefix, labels in (("kvferry_", {}), ("vllm:", VLLM)):
        name = f"{prefix}inter_token_latency_seconds"
        assert samples[_key(f"{name}_bucket", le="0.001", **labels)] == 1
        assert samples[_key(f"{name}_bucket", le="0.025", **labels)] == 1
        assert samples[_key(f"{name}_bucket", le="0.05", **labels)] == 3
        assert samples[_key(f"{name}_bucket", le="+Inf", **labels)] == 4
        assert samples[_key(f"{name}_count", **labels)] == 4
        assert samples[_key(f"{name}_sum", **labels)] == pytest.approx(99.061)


def test_tokens_and_ends_are_counted_under_both_names() -> None:
    metrics = RouterMetrics("m")
    metrics.on_answer(5, 7, ["stop", "length", "stop"])
    metrics.on_finished(_Request(num_cached_tokens=3))
    samples = _samples(metrics)
    for name in ("kvferry_cached_prompt_tokens_total", "vllm:prompt_tokens_cached_total"):
        assert samples[_key(name, **(VLLM if name.startswith("vllm:") else {}))] == 3
    assert samples[_key("kvferry_prompt_tokens_total")] == samples[_key("vllm:prompt_tokens_total", **VLLM)] == 5
    assert samples[_key("vllm:generation_tokens_total", **VLLM)] == 7
    assert samples[_key("vllm:request_success_total", **VLLM, finished_reason="stop")] == 2


def test_transfers_are_measured_where_they_ended_cleanly_and_counted_where_not() -> None:
    metrics = RouterMetrics("m")
    report = {"request_id": "r", "attempt": 1, "decode_worker": "d-0", "num_bytes": 4096, "num_blocks": 1}
    metrics.on_transfer(TransferReport(**report, transfer_s=0.2, exposed_s=0.1, clean=True))  # type: ignore[arg-type]
    metrics.on_transfer(TransferReport(**report, transfer_s=0.2, exposed_s=0.1, clean=False))  # type: ignore[arg-type]
    samples = _samples(metrics)
    assert samples[_key("kvferry_kv_transfer_seconds_sum")] == 0.2
    assert samples[_key("kvferry_kv_transfer_exposed_seconds_sum")] == 0.1
    assert samples[_key("kvferry_kv_transfer_bytes_sum")] == 4096
    assert samples[_key("vllm:nixl_xfer_time_seconds_count", **VLLM)] == 1
    assert samples[_key("vllm:nixl_bytes_transferred_sum", **VLLM)] == 4096
    assert samples[_key("vllm:nixl_num_failed_transfers_total", **VLLM)] == 1


def test_no_value_from_outside_makes_a_new_label() -> None:
    metrics = RouterMetrics("m")
    before = len(_samples(metrics))
    for index in range(1000):
        word = f"x{index}"
        metrics.on_retry(word, word)
        metrics.on_fallback(word)
        metrics.on_dropped(word)
        metrics.on_response(1000 + index)
        metrics.on_answer(0, 0, [word])
    samples = _samples(metrics)
    assert samples[_key("kvferry_retries_total", stage="other", reason="other")] == 1000
    assert len(samples) - before <= 6


def test_known_labels_stay() -> None:
    metrics = RouterMetrics("m")
    metrics.on_retry("transfer", "handoff_failed")
    metrics.on_fallback("local_prefill")
    metrics.on_dropped("stale_attempt")
    codes = (204, 206, 403, 409, 416, 422, 429, 501, 505, 507)  # answers of this program that are not all day's
    for code in codes:
        metrics.on_response(code)
    samples = _samples(metrics)
    assert samples[_key("kvferry_retries_total", stage="transfer", reason="handoff_failed")] == 1
    assert samples[_key("kvferry_fallback_total", kind="local_prefill")] == 1
    assert samples[_key("kvferry_dropped_messages_total", kind="stale_attempt")] == 1
    assert all(samples[_key("kvferry_requests_total", code=str(code))] == 1 for code in codes)


def test_workers_gauges_are_their_last_heartbeats() -> None:
    starting = _Worker("d-1", "decode", _status(state="starting", num_blocks=0, num_free_blocks=0), is_ready=False)
    view = _View((_Worker("d-0", "decode", _status()), _Worker("p-0", "prefill", None), starting), num_queued=6)
    samples = _samples(RouterMetrics("m"), view)
    blocks = {"free": 10, "cached": 30, "granted": 5, "quarantined": 1, "active": 54}
    for state, count in blocks.items():
        assert samples[_key("kvferry_blocks", worker="d-0", pool="decode", state=state)] == count
    assert samples[_key("kvferry_worker_state", worker="d-0", pool="decode", state="ready")] == 1
    assert samples[_key("kvferry_worker_state", worker="p-0", pool="prefill", state="starting")] == 1
    assert samples[_key("kvferry_worker_state", worker="p-0", pool="prefill", state="ready")] == 0
    assert samples[_key("kvferry_worker_state", worker="d-1", pool="decode", state="starting")] == 1
    assert samples[_key("vllm:kv_cache_usage_perc", model_name="m", engine="d-1")] == 0
    assert samples[_key("kvferry_queued_requests")] == 6
    engine = {"model_name": "m", "engine": "d-0"}
    assert samples[_key("vllm:num_requests_running", **engine)] == 3
    assert samples[_key("vllm:num_requests_waiting", **engine)] == 2
    assert samples[_key("vllm:num_requests_waiting", model_name="m", engine="router")] == 6
    assert samples[_key("vllm:kv_cache_usage_perc", **engine)] == pytest.approx(0.6)
    assert samples[_key("vllm:prefix_cache_queries_total", **engine)] == 200
    assert samples[_key("vllm:prefix_cache_hits_total", **engine)] == 80
    assert samples[_key("vllm:num_preemptions_total", **engine)] == 7


def test_a_worker_that_the_router_drains_is_draining_before_it_says_so() -> None:
    view = _View((_Worker("d-0", "decode", _status(), is_ready=False),))
    samples = _samples(RouterMetrics("m"), view)
    assert samples[_key("kvferry_worker_state", worker="d-0", pool="decode", state="draining")] == 1


def test_a_worker_that_left_leaves_no_gauge() -> None:
    metrics = RouterMetrics("m")
    view = _View((_Worker("d-0", "decode", _status()),))
    assert any(("worker", "d-0") in labels for _, labels in _samples(metrics, view))
    assert not any(("worker", "d-0") in labels for _, labels in _samples(metrics))


def test_instances_share_nothing() -> None:
    first, second = RouterMetrics("a"), RouterMetrics("b")
    first.on_answer(5, 5, [])
    assert _samples(second)[_key("kvferry_prompt_tokens_total")] == 0


def test_every_family_has_a_help_text_and_no_creation_times() -> None:
    body, _ = RouterMetrics("m").scrape([("m", _View())], num_in_flight=0)()
    families = list(text_string_to_metric_families(body.decode()))
    assert all(family.documentation for family in families)
    assert b"_created" not in body
    names = [family.name for family in families]
    assert len(names) == len(set(names))


def test_every_family_of_heartbeats_has_a_number() -> None:
    view = _View((_Worker("d-0", "decode", _status()),))
    body, _ = RouterMetrics("m").scrape([("m", view)], num_in_flight=0)()
    families = [
        each for each in text_string_to_metric_families(body.decode()) if each.name.startswith("kvferry_worker_")
    ]
    assert families and all(family.samples for family in families)


def test_every_value_of_a_closed_label_is_there_from_the_start() -> None:
    samples = _samples(RouterMetrics("m"))
    for reason in ("queue_full", "objective", "deadline", "displaced", "late"):
        assert samples[_key("kvferry_rejections_total", reason=reason)] == 0
    assert samples[_key("kvferry_resumes_total", result="ok")] == 0
    assert samples[_key("kvferry_retries_total", stage="decode", reason="drained")] == 0
    assert samples[_key("kvferry_requests_total", code="429")] == 0
    for name in ("poisoned", "retry_budget_exhausted", "drains", "fenced_messages", "auth_failures"):
        assert samples[_key(f"kvferry_{name}_total")] == 0


def test_faults_are_counted() -> None:
    metrics = RouterMetrics("m")
    metrics.on_poisoned()
    metrics.on_budget_exhausted()
    metrics.on_drain()
    metrics.on_resumed("ok")
    metrics.on_rejected("objective")
    metrics.on_rejected("something else")
    metrics.on_handshake_refused("seal")
    metrics.on_auth_failure()
    metrics.on_slow_client("head")
    metrics.on_refused_connection("total")
    samples = _samples(metrics)
    for name in ("poisoned", "retry_budget_exhausted", "drains", "auth_failures"):
        assert samples[_key(f"kvferry_{name}_total")] == 1
    assert samples[_key("kvferry_resumes_total", result="ok")] == 1
    assert samples[_key("kvferry_rejections_total", reason="objective")] == 1
    assert samples[_key("kvferry_rejections_total", reason="other")] == 1
    assert samples[_key("kvferry_handshake_rejects_total", kind="seal")] == 1
    assert samples[_key("kvferry_slow_clients_total", kind="head")] == 1
    assert samples[_key("kvferry_refused_connections_total", reason="total")] == 1


def test_messages_of_workers_that_were_given_up_count_as_fenced() -> None:
    metrics = RouterMetrics("m")
    for kind in ("stale_attempt", "old_session", "wrong_worker", "duplicate", "unknown_request"):
        metrics.on_dropped(kind)
    samples = _samples(metrics)
    assert samples[_key("kvferry_fenced_messages_total")] == 3
    assert samples[_key("kvferry_duplicate_tokens_dropped_total")] == 1


@pytest.mark.slow
def test_every_number_of_a_heartbeat_is_exported() -> None:
    def told(status: WorkerStatus) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return _samples(RouterMetrics("m"), _View((_Worker("d-0", "decode", status),)))

    plain = told(_status())
    for name in WorkerStatus.__struct_fields__:
        value = getattr(_status(), name)
        if isinstance(value, int | float) and name not in ("seq", "step_tokens"):
            assert told(_status(**{name: value + 1})) != plain, name


def test_what_goes_up_and_down_is_a_gauge() -> None:
    view = _View((_Worker("d-0", "decode", _status(loading_adapters=2)),))
    body, _ = RouterMetrics("m").scrape([("m", view)], num_in_flight=0)()
    kinds = {family.name: family.type for family in text_string_to_metric_families(body.decode())}
    assert kinds["kvferry_loading_adapters"] == "gauge"
    assert not [name for name in kinds if "loading_adapters" in name and name != "kvferry_loading_adapters"]


class _Changing(_View):
    """A pool as the event loop has it; it tells which thread looks at its workers."""

    def __init__(self, looks: list[str]) -> None:
        self._looks, self.queued_by_class = looks, {"default": 1}

        self.joined = [_Worker("d-0", "decode", _status())]

    @property
    def workers(self) -> list[_Worker]:  # type: ignore[override]
        self._looks.append(threading.current_thread().name)
        return self.joined


def test_a_scrape_takes_a_picture_of_the_pools_and_writes_it_later() -> None:
    """Workers come and go while a thread writes: it reads what was there, and the event loop writes nothing."""
    looks: list[str] = []
    view = _Changing(looks)
    write = RouterMetrics("m", ("default",)).scrape([("m", view)], num_in_flight=0)
    assert looks == ["MainThread"]
    view.queued_by_class["default"] = 7
    view.joined.clear()
    with ThreadPoolExecutor(1) as threads:
        text = threads.submit(write).result()[0].decode()
    assert looks == ["MainThread"]
    assert 'kvferry_queued_requests_by_class{class="default"} 1.0' in text
    assert 'kvferry_engine_steps_total{pool="decode",worker="d-0"} 9.0' in text


def test_a_scrape_leaves_the_families_of_workers_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def families(*_: object) -> list[Metric]:
        written.append("families")
        return []

    monkeypatch.setattr(metrics_module, "pool_families", families)
    write = RouterMetrics("m").scrape([("m", _View())], num_in_flight=0)
    assert not written
    write()
    assert written


def test_a_skewed_choice_of_experts_shows() -> None:
    loads = [ExpertLoad.after(None, (ExpertCounts(0, (9, 1, 1, 1), ranks),)) for ranks in ((10, 2), ())]
    workers = tuple(_Worker(f"d-{i}", "decode", _status(), expert_load=load) for i, load in enumerate(loads))
    samples = _samples(RouterMetrics("m"), _View((*workers, _Worker("d-2", "decode", _status()))))
    assert samples[_key("kvferry_expert_imbalance", worker="d-0", pool="decode")] == 3.0
    assert samples[_key("kvferry_expert_rank_imbalance", worker="d-0", pool="decode")] == pytest.approx(10 / 6)
    assert samples[_key("kvferry_expert_choices_total", worker="d-1", pool="decode")] == 12
    names = [name for name, labels in samples if name.startswith("kvferry_expert_")]
    assert len(names) == 5  # no rank's of d-1, nothing of d-2


def test_rejected_grants_are_counted_by_reason_and_unknown_reasons_as_other() -> None:
    status = _status(grant_rejects=(("mac", 2), ("reused", 1), ("from\nelsewhere", 5), ("more", 1)))
    samples = _samples(RouterMetrics("m"), _View((_Worker("d-0", "decode", status),)))
    by_reason = {
        dict(labels)["reason"]: value
        for (name, labels), value in samples.items()
        if name == "kvferry_grant_rejects_total"
    }
    assert {reason: count for reason, count in by_reason.items() if count} == {"mac": 2, "reused": 1, "other": 6}
    assert "fenced_peer" in by_reason


# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    request_class: str = "default"
    is_good: bool | None = True
    missed_stage: str = ""
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    ttft_error: float | None = None
    tpot_error: float | None = None


def test_answers_are_counted_by_class_and_by_the_stage_that_missed() -> None:
    metrics = RouterMetrics("m", ("default", "batch"))
    for outcome in (
        _Outcome(),
        _Outcome("batch"),
        _Outcome("batch", False, "prefill_wait"),
        _Outcome("batch", False, "a stage of tomorrow"),
        _Outcome("somebody's", False, "queue"),
        _Outcome("batch", None),  # its client left
    ):
        metrics.on_outcome(outcome)
    samples = _samples(metrics)
    good, missed = "kvferry_goodput_requests_total", "kvferry_slo_misses_total"
    assert samples[_key(good, **{"class": "default"})] == samples[_key(good, **{"class": "batch"})] == 1
    assert samples[_key(missed, **{"class": "batch"}, stage="prefill_wait")] == 1
    assert samples[_key(missed, **{"class": "batch"}, stage="other")] == 1
    assert samples[_key(missed, **{"class": "other"}, stage="queue")] == 1
    assert samples[_key(missed, **{"class": "default"}, stage="decode")] == 0  # every series is there from the start
    assert sum(value for (name, _), value in samples.items() if name == missed) == 3


def test_predictions_and_their_errors_fill_histograms() -> None:
    metrics = RouterMetrics("m")
    metrics.on_outcome(_Outcome(predicted_ttft_s=0.2, predicted_tpot_s=0.02, ttft_error=1.3, tpot_error=0.9))
    metrics.on_outcome(_Outcome())
    samples = _samples(metrics)
    for name, value in (
        ("predicted_ttft_seconds", 0.2),
        ("predicted_tpot_seconds", 0.02),
        ("ttft_prediction_error_ratio", 1.3),
        ("tpot_prediction_error_ratio", 0.9),
    ):
        assert samples[_key(f"kvferry_{name}_count")] == 1
        assert samples[_key(f"kvferry_{name}_sum")] == pytest.approx(value)


def test_placements_are_counted_by_policy_and_reason() -> None:
    metrics = RouterMetrics("m")
    metrics.on_placed("slo", "handoff")
    metrics.on_placed("mine", "because")
    samples = _samples(metrics)
    assert samples[_key("kvferry_placements_total", policy="slo", reason="handoff")] == 1
    assert samples[_key("kvferry_placements_total", policy="other", reason="other")] == 1


def test_the_queue_is_shown_by_class() -> None:
    samples = _samples(RouterMetrics("m", ("default", "batch")), _View(num_queued=3, queued_by_class={"batch": 3}))
    assert samples[_key("kvferry_queued_requests_by_class", **{"class": "batch"})] == 3
    assert samples[_key("kvferry_queued_requests_by_class", **{"class": "default"})] == 0
