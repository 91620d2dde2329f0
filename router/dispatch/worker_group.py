"""Workers that serve the same version of a model: what each must be, and the dispatcher that it works for.

The control server asks here into which group a worker goes that says hello.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...common.errors import ProtocolError
from ...wire.workers import WorkerHello
from .dispatcher import Dispatcher

ROLES = ("prefill", "decode")


@dataclass(slots=True, frozen=True)
class Expected:
    """The properties that every worker of a group must have. The KV cache's layout is the first worker's."""

    version: str
    model: str  # the served name
    max_model_len: int | None = None  # None: the first worker's
    deterministic: bool = False


@dataclass(slots=True, frozen=True, eq=False)
class WorkerGroup:
    """The workers of one version talk to one dispatcher, and get requests from it alone."""

    expected: Expected
    dispatcher: Dispatcher


def find_group(
    hello: WorkerHello, groups: Iterable[WorkerGroup], peer_in: Callable[[WorkerGroup], WorkerHello | None]
) -> WorkerGroup:
    """Return the group that this worker fits. `peer_in`: a worker of a group that has joined before.

    Raises ProtocolError where there is none, with what differs from the group of the worker's model, else the first.
    """
    reasons = []
    for group in groups:
        reason = mismatch(hello, group.expected, peer_in(group))
        if not reason:
            return group
        reasons.append((group.expected.model != hello.model, reason))
    _, reason = min(reasons, key=lambda found: found[0])
    raise ProtocolError(reason, kind="mismatch")


def mismatch(hello: WorkerHello, expected: Expected, peer: WorkerHello | None) -> str:
    """Return why this worker cannot join: what differs, both values. Empty: it can. `peer` has joined before."""
    if hello.role not in ROLES:
        return f"role {hello.role!r} of worker {hello.worker_id} is not one of {', '.join(ROLES)}"
    checks: list[tuple[str, object, object, str]] = [
        ("version", hello.version, expected.version, "the router's"),
        ("model", hello.model, expected.model, "the router's"),
        ("deterministic", bool(hello.spec.results), expected.deterministic, "the router's"),
    ]
    if expected.max_model_len is not None:
        checks.append(("max_model_len", hello.max_model_len, expected.max_model_len, "the router's"))
    if peer is not None:
        checks.append(("max_model_len", hello.max_model_len, peer.max_model_len, f"worker {peer.worker_id}'s"))
        if hello.spec.model != peer.spec.model:
            checks.append(("quantization", hello.quantization, peer.quantization, f"worker {peer.worker_id}'s"))
        checks.append(("weights", hello.spec.model, peer.spec.model, f"worker {peer.worker_id}'s"))
        checks.append(("draft model", hello.spec.draft, peer.spec.draft, f"worker {peer.worker_id}'s"))
        checks.append(("KV cache", hello.spec.fingerprint, peer.spec.fingerprint, f"worker {peer.worker_id}'s"))
    for name, theirs, ours, whose in checks:
        if theirs != ours:
            detail = f" ({hello.spec} and {peer.spec})" if name == "KV cache" and peer is not None else ""
            return f"{name} {theirs!r} of worker {hello.worker_id} is not {whose} {ours!r}{detail}"
    return ""
