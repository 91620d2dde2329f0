"""The closed label sets: what is not in them counts as "other", so no client can make the memory grow."""

from __future__ import annotations

OTHER = "other"
CLOSED: dict[str, frozenset[str]] = {
    "finished_reason": frozenset({"stop", "length", "abort", "error"}),
    "stage": frozenset({"reserve", "prefill", "transfer", "decode"}),
    "reason": frozenset("worker_lost drained worker_failure refused handoff_failed no_answer gap forgotten".split()),
    "fallback": frozenset({"local_prefill", "recompute"}),
    "dropped": frozenset(
        "stale_attempt unknown_request unknown_choice old_session wrong_worker out_of_turn "
        "duplicate mismatch overflow prompt_logprobs".split()
    ),
    "code": frozenset(
        "200 204 206 400 401 403 404 405 408 409 413 415 416 422 429 499 500 501 503 504 505 507".split()
    ),
    "rejected": frozenset("queue_full objective deadline displaced late draining quota".split()),
    "resumed": frozenset({"ok", "failed", "aborted"}),
    "slow": frozenset({"head", "body", "idle", "read", "framing", "handshake"}),
    "connection": frozenset({"total", "address", "evicted"}),
    "refused": frozenset("frame size seal hello flood mismatch".split()),
    "batch_line": frozenset({"ok", "error"}),
    "missed": frozenset("queue retry reserve prefill_wait prefill reply transfer decode failed".split()),
    "policy": frozenset("slo least_loaded kv_cost round_robin isolation".split()),
    "placed": frozenset(
        "handoff short_prompt colocated no_prefill_worker failed_handoff alone sooner embedding".split()
    ),
}
FENCED = frozenset({"stale_attempt", "old_session", "wrong_worker"})  # from a worker that was given up before


def closed(label: str, value: str) -> str:
    return value if value in CLOSED[label] else OTHER
