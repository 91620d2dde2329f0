"""The system of a chaos run as its log and its metrics show it: lines as notes, blocks by what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..load.http_client import HttpClient
from .events import Note
from .serve_system import Sample, System, parse_log_line, whole_lines

_POLL_S = 0.05
_KEPT = ("worker_joined", "worker_lost", "attempt_failed", "request_failed", "request_finished")
_DETAILS = (
    "pid",
    "role",
    "reason",
    "stage",
    "attempt",
    "attempts",
    "code",
    "error",
    "status",
    "completion_tokens",
    "repeated_tokens",
)


class LogTail:
    """Reads a log that grows."""

    def __init__(self, path: Path, wall_began_s: float, on_note: Callable[[Note], None]) -> None:
        """`wall_began_s`: the run's beginning as the log's clock shows it."""
        self._path = path
        self._wall_began_s = wall_began_s
        self._on_note = on_note
        self._offset = 0

    async def follow(self) -> None:
        while True:
            self.read()
            await asyncio.sleep(_POLL_S)

    def read(self) -> None:
        """Tell what was written since."""
        text = whole_lines(self._path, self._offset)
        self._offset += len(text)
        for line in text.splitlines():
            parsed = parse_log_line(line)
            if parsed is None or parsed.event not in _KEPT:
                continue
            fields = parsed.fields
            self._on_note(
                Note(
                    at_s=parsed.at_s - self._wall_began_s,
                    what=parsed.event,
                    worker_id=str(fields.get("worker_id", "")),
                    # Of a call's prompts: which one. An answer that its client came back for has its first call's name.
                    answer_id=str(fields.get("answer_id") or fields.get("request_id", "")).partition("-")[0],
                    detail={name: fields[name] for name in _DETAILS if name in fields},
                )
            )


@dataclass(slots=True)
class Books:
    """The end of a run, as the workers' blocks tell it."""

    num_workers: int
    num_blocks: int
    num_held: int  # neither free nor cached nor quarantined
    num_quarantined: int
    num_requests: int  # still in a router or on a worker

    @property
    def is_quiet(self) -> bool:
        return not (self.num_held or self.num_quarantined or self.num_requests)


async def read_books(system: System, client: HttpClient, admins: Sequence[HttpClient] = ()) -> Books:
    """Read them of each router's admin listener; without those, of whichever router answers `client`."""
    seen = [await system.samples(admin, "/admin/metrics") for admin in admins]
    return balance(*(seen or [await system.samples(client)]))


def balance(*seen: list[Sample]) -> Books:
    """Make the books of what each router tells: every one has its own queue, and sees the same workers."""
    books = [_books_of(samples) for samples in seen]
    return Books(
        num_workers=min(each.num_workers for each in books),
        num_blocks=max(each.num_blocks for each in books),
        num_held=max(each.num_held for each in books),
        num_quarantined=max(each.num_quarantined for each in books),
        num_requests=sum(map(_num_queued, seen)) + max(each.num_requests for each in books),
    )


def _num_queued(samples: list[Sample]) -> int:
    return int(sum(sample.value for sample in samples if sample.name == "kvferry_queued_requests"))


def _books_of(samples: list[Sample]) -> Books:
    """Make the books of the workers as one router sees them."""
    blocks = [sample for sample in samples if sample.name == "kvferry_blocks"]
    by_state: dict[str, float] = {}
    for sample in blocks:
        state = sample.labels["state"]
        by_state[state] = by_state.get(state, 0) + sample.value
    busy = ("kvferry_num_requests_running", "kvferry_num_requests_waiting")
    quarantined = by_state.pop("quarantined", 0)
    total = sum(by_state.values()) + quarantined
    return Books(
        num_workers=len({sample.labels["worker"] for sample in blocks}),
        num_blocks=int(total),
        num_held=int(total - quarantined - by_state.get("free", 0) - by_state.get("cached", 0)),
        num_quarantined=int(quarantined),
        num_requests=int(sum(sample.value for sample in samples if sample.name in busy)),
    )


async def settle(
    system: System, num_workers: int, timeout_s: float, admin_urls: Sequence[str] = ()
) -> tuple[Books, float]:
    """Wait until every worker is there and no block is held, or the time is over. The books, and how long it took.

    `admin_urls`: each router's, where all of several are asked.
    """
    client, admins = HttpClient(system.base_url), [HttpClient(url) for url in admin_urls]
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        while True:
            books = await read_books(system, client, admins)
            elapsed_s = loop.time() - began_s
            if elapsed_s > timeout_s or (books.is_quiet and books.num_workers == num_workers):
                return books, elapsed_s
            await asyncio.sleep(_POLL_S)
    finally:
        for each in (client, *admins):
            each.close()
