"""`kvferry explain`: asks a router's admin listener about requests and shows the answer as tables."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from ...common.errors import KVFerryError
from ..state.outcome import TPOT_STAGES, TTFT_STAGES

_TIMEOUT_S = 10.0
_LISTED = 30
# A proxy of the environment's is for the way out: it reaches no loopback, and would be told the operator's key.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_Row = Mapping[str, Any]


def fetch(admin: str, path: str, key: str) -> dict[str, Any]:
    """Return what GET `path` answers. Raises KVFerryError with the listener's own words."""
    base = admin if "://" in admin else f"http://{admin}"
    try:
        parts = urllib.parse.urlsplit(base)
        is_address = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
        is_address = is_address and parts.port != 0  # beyond 65535 it raises; what connects would take another port
        request = urllib.request.Request(base.rstrip("/") + path)
    except ValueError:
        is_address = False
    if not is_address:
        raise KVFerryError(f"--admin: {admin} is no HTTP address")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise KVFerryError(_message_of(error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise KVFerryError(f"no answer from {base}{path}: {error}") from None
    return found


def fetch_first(admins: Sequence[str], path: str, key: str) -> dict[str, Any]:
    """Return what the first of several routers answers that knows it. Raises KVFerryError where none does."""
    errors: list[str] = []
    for admin in admins:
        try:
            return fetch(admin, path, key)
        except KVFerryError as error:
            errors.append(str(error))
    raise KVFerryError("; ".join(dict.fromkeys(errors)))


def _message_of(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


def path_of(request_id: str) -> str:
    return f"/admin/requests/{urllib.parse.quote(request_id, safe='')}"


def list_path(kind: str) -> str:
    return f"/admin/requests?{urllib.parse.urlencode({'kind': kind, 'limit': _LISTED})}"


def show(console: Console, known: _Row) -> None:
    """One request."""
    console.print(_summary(known))
    if known["phases_ms"]:
        console.print(_phases(known["phases_ms"], known["missed_stage"]))
    for decision in known["decisions"]:
        console.print(_decision(decision))


def show_list(console: Console, requests: Sequence[_Row]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("request", "class", "status", "prompt", "TTFT ms", "predicted", "TPOT ms", "missed", "workers"):
        table.add_column(name, justify="right" if name in ("prompt", "TTFT ms", "predicted", "TPOT ms") else "left")
    for row in requests:
        table.add_row(
            row["request_id"],
            row["class"],
            row["error"] or row["status"],
            str(row["prompt_tokens"]),
            _ms(row["ttft_ms"]),
            _ms(row["predicted_ttft_ms"]),
            _ms(row["tpot_ms"]),
            row["missed_stage"] or "",
            _pair(row),
        )
    console.print(table)


def _summary(known: _Row) -> RenderableType:
    objectives = known["objectives"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("request", f"{known['request_id']}, class {known['class']}, priority {known['priority']}")
    status = known["status"] + (f" ({known['error']})" if known["error"] else "")
    waits = f", waits for {known['waiting_for']}" if known["waiting_for"] else ""
    missed = (
        "" if known["good"] is None else ", objectives met" if known["good"] else f", missed: {known['missed_stage']}"
    )
    facts.add_row("status", f"{status}{waits}{missed}")
    cached = f", {known['cached_tokens']} of them cached" if known["cached_tokens"] else ""
    facts.add_row("tokens", f"{known['prompt_tokens']} in{cached}, {known['output_tokens']} out")
    times = Table(box=None, pad_edge=False)
    for name in ("", "actual ms", "predicted", "objective"):
        times.add_column(name, justify="right" if name else "left")
    for name in ("ttft", "tpot"):
        row = (known[f"{name}_ms"], known[f"predicted_{name}_ms"], objectives[f"{name}_ms"])
        times.add_row(name.upper(), *map(_ms, row))
    return Group(facts, times)


def _phases(phases: Mapping[str, float], missed: str | None) -> Table:
    table = Table(box=None, pad_edge=False, title="Phases", title_justify="left")
    for name in phases:
        table.add_column(f"{name}*" if name == missed else name, justify="right")
    table.add_row(*map(_ms, phases.values()))
    known = [*TTFT_STAGES, *TPOT_STAGES]
    table.caption = "* spent most of the time in excess" if missed in known else None
    return table


def _decision(decision: _Row) -> RenderableType:
    waited = f", after waiting for {decision['waited_for']}" if decision["waited_for"] else ""
    title = (
        f"Attempt {decision['attempt']} at {_ms(decision['at_ms'])} ms: {_pair(decision)} "
        f"by {decision['policy']} ({decision['reason']}){waited}"
    )
    if not decision["candidates"]:
        return title
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    columns = ("ttft_ms", "tpot_ms", "wait_ms", "prefill_ms", "transfer_ms", "cached_tokens", "score")
    table.add_column("candidate")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("")
    for one in decision["candidates"]:
        is_chosen = _pair(one) == _pair(decision)
        cells = ["" if one["rejected"] else _cell(name, one[name]) for name in columns]
        table.add_row(_pair(one), *cells, one["rejected"] or ("chosen" if is_chosen else ""))
    return table


def _pair(row: _Row) -> str:
    prefill, decode = row["prefill_worker"], row["decode_worker"]
    return f"{prefill} -> {decode}" if prefill and decode else prefill or decode or "-"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(name: str, value: float | None) -> str:
    return _ms(value) if name.endswith("_ms") or value is None else f"{value:.4g}"
