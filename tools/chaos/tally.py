"""A tally of a chaos run: promises kept or broken, and how long things took. Pure, with its table.

stream gap   of a stream whose decode worker died: from the blow to the first chunk after the router placed it anew.
recompute    what the same request, undisturbed, took to its first token: the prompt is computed and shipped again.
             Tokens that are fed again come on top; they are one more chunk.
notice       from the blow to the router's line `worker_lost`.
absence      from a worker's death until the router has a new one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from ..load.report import milliseconds
from ..load.stats import Distribution, describe_ms
from .events import Note, Request
from .history import check_rows
from .load import Result
from .system import Books
from .workers import Strike

_RESUMED_WITHIN_S = 10.0  # an attempt that fails later than this after a blow has another cause
_MAX_SHOWN = 20
_DEATHS = ("kill", "rank")


@dataclass(slots=True)
class Tally:
    """Counts first: a run is good if every one of `broken` is 0, and it could have shown otherwise."""

    num_sent: int
    num_answered: int
    num_left: int  # their clients did, before the end
    num_failed: int
    num_lost: int
    num_compared: int  # answers that were held against an undisturbed one
    num_different: int
    num_tokens: int
    num_missing_tokens: int
    num_repeated_tokens: int
    num_changed_tokens: int
    num_breaches: int  # of I6, I8 and I9
    books: Books
    settled_s: float
    num_routers: int
    num_workers: int  # as there should be
    blows: dict[str, int]
    num_deaths: int
    num_restarts: int
    num_failed_attempts: dict[str, int]  # by stage
    num_resumed: int  # streams that went on elsewhere
    gap_ms: Distribution
    recompute_ms: Distribution
    net_gap_ms: Distribution  # less the recomputation, stream by stream
    hang_gap_ms: Distribution
    death_notice_ms: Distribution
    hang_notice_ms: Distribution
    absence_ms: Distribution
    failures: dict[str, int] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)  # the first of all kinds, in words

    @property
    def broken(self) -> dict[str, int]:
        """Return the counts that must be 0."""
        return {
            "requests lost": self.num_lost,
            "requests failed": self.num_failed,
            "tokens missing": self.num_missing_tokens,
            "tokens repeated": self.num_repeated_tokens,
            "tokens changed": self.num_changed_tokens,
            "answers not byte-identical": self.num_different,
            "histories with a breach": self.num_breaches,
            "blocks leaked": self.books.num_held,
            "blocks left in quarantine": self.books.num_quarantined,
            "requests left over": self.books.num_requests,
            "workers not back": self.num_workers - self.books.num_workers,
        }

    @property
    def lack(self) -> str:
        """Say why the run shows nothing; empty: it does."""
        if not self.blows:
            return "nothing was struck"
        return "" if self.num_compared else "no answer could be compared with an undisturbed one"

    @property
    def is_good(self) -> bool:
        return not self.lack and not any(self.broken.values())

    def as_json(self) -> dict[str, object]:
        return {"is_good": self.is_good, "lack": self.lack, "broken": self.broken, **asdict(self)}


def tally(
    results: Sequence[Result],
    references: Mapping[int, Request],
    notes: Sequence[Note],
    strikes: Sequence[Strike],
    books: Books,
    *,
    settled_s: float,
    num_routers: int,
    num_workers: int,
    num_joined: int,
) -> Tally:
    verdicts = [result.verdict for result in results]
    breaches = [breach for verdict in verdicts for breach in verdict.breaches]
    breaches += check_rows([result.counted for result in results if result.counted is not None], notes)
    failed = [note for note in notes if note.what == "attempt_failed"]
    gaps = list(find_gaps(results, references, failed, strikes))
    by_kill = [gap for gap in gaps if gap.kind in _DEATHS]
    answered = [result for result in results if result.counted is not None]
    return Tally(
        num_sent=len(results),
        num_answered=len(answered),
        num_left=sum(result.has_left for result in results),
        num_failed=sum(bool(result.failure) and not result.verdict.is_lost for result in results),
        num_lost=sum(verdict.is_lost for verdict in verdicts),
        num_compared=sum(result.ask in references for result in answered),
        num_different=len({breach.request for breach in breaches if breach.rule == "EQ"}),
        num_tokens=sum(verdict.num_tokens for verdict in verdicts),
        num_missing_tokens=sum(verdict.num_missing for verdict in verdicts),
        num_repeated_tokens=sum(verdict.num_repeated for verdict in verdicts),
        num_changed_tokens=sum(verdict.num_changed for verdict in verdicts),
        num_breaches=len({breach.request for breach in breaches if breach.rule != "EQ"}),
        books=books,
        settled_s=settled_s,
        num_routers=num_routers,
        num_workers=num_workers,
        blows=dict(Counter(f"{strike.kind} {strike.role}" for strike in strikes)),
        num_deaths=sum(strike.died_s is not None for strike in strikes),
        num_restarts=max(0, num_joined - num_workers),
        num_failed_attempts=dict(Counter(str(note.detail.get("stage")) for note in failed)),
        num_resumed=len({note.answer_id for note in failed if note.detail.get("stage") == "decode"}),
        gap_ms=describe_ms(gap.gap_s for gap in by_kill),
        recompute_ms=describe_ms(gap.recompute_s for gap in by_kill),
        net_gap_ms=describe_ms(max(0.0, gap.gap_s - gap.recompute_s) for gap in by_kill),
        hang_gap_ms=describe_ms(gap.gap_s for gap in gaps if gap.kind not in _DEATHS),
        death_notice_ms=describe_ms(strike.notice_s for strike in strikes if strike.kind in _DEATHS),
        hang_notice_ms=describe_ms(strike.notice_s for strike in strikes if strike.kind == "hang"),
        absence_ms=describe_ms(strike.absence_s for strike in strikes),
        failures=dict(Counter(result.failure for result in results if result.failure).most_common(_MAX_SHOWN)),
        breaches=[str(breach) for breach in breaches[:_MAX_SHOWN]],
    )


@dataclass(slots=True, frozen=True)
class Gap:
    """A pause of one stream."""

    kind: str  # of the blow
    gap_s: float
    recompute_s: float


def find_gaps(
    results: Sequence[Result],
    references: Mapping[int, Request],
    failed: Iterable[Note],
    strikes: Sequence[Strike],
) -> Iterable[Gap]:
    """Find the gaps of streams that had begun, were decoding on a worker that was struck, and went on."""
    by_answer = {result.answer_id: result for result in results if result.answer_id}
    for note in failed:
        result, strike = by_answer.get(note.answer_id), _cause(note, strikes)
        if result is None or strike is None or note.detail.get("stage") != "decode":
            continue
        seen = bisect_right(result.times_s, note.at_s)
        if 0 < seen < len(result.times_s):
            reference = references.get(result.ask)
            recompute_s = 0.0 if reference is None else _first_token_s(reference)
            yield Gap(strike.kind, result.times_s[seen] - strike.at_s, recompute_s)


def _cause(note: Note, strikes: Sequence[Strike]) -> Strike | None:
    """The last blow to the worker that the router blames."""
    reason = str(note.detail.get("reason", ""))
    for strike in reversed(strikes):
        if strike.at_s <= note.at_s and strike.worker_id in reason:
            return strike if note.at_s - strike.at_s < _RESUMED_WITHIN_S else None
    return None


def _first_token_s(reference: Request) -> float:
    times = reference.chunk_times_s()
    return times[0] - reference.sent.at_s if times else 0.0


def print_tally(found: Tally, title: str, console: Console) -> None:
    console.print(_counts_table(found, title))
    console.print(_times_table(found))
    for text in found.breaches:
        console.print(text, style="red", markup=False, soft_wrap=True)
    for text, number in found.failures.items():
        console.print(f"{number} x {text}", style="red", markup=False, soft_wrap=True)


def _counts_table(found: Tally, title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    blows = ", ".join(f"{number} {what}" for what, number in sorted(found.blows.items()))
    attempts = ", ".join(f"{number} in {stage}" for stage, number in sorted(found.num_failed_attempts.items()))
    facts = {
        "requests sent / answered / left by their clients": (
            f"{found.num_sent:,} / {found.num_answered:,} / {found.num_left:,}"
        ),
        "tokens delivered": f"{found.num_tokens:,}",
        "answers compared with undisturbed ones": f"{found.num_compared:,}",
        "blows": blows or "none",
        "workers that died / were started again": f"{found.num_deaths} / {found.num_restarts}",
        "attempts that failed": attempts or "none",
        "streams that went on elsewhere": str(found.num_resumed),
        "all blocks free after the last answer": f"{found.settled_s:.1f} s",
    }
    for name, text in facts.items():
        table.add_row(name, text)
    table.add_section()
    for name, number in found.broken.items():
        table.add_row(name, f"{number:,}", style="red" if number else "green")
    return table


def _times_table(found: Tally) -> Table:
    table = Table()
    table.add_column("ms")
    for column in ("p50", "p99", "max", "count", "bar"):
        table.add_column(column, justify="right")
    rows = (
        ("stream gap at SIGKILL", found.gap_ms, "p50 400"),
        ("  of it recomputation", found.recompute_ms, ""),
        ("  without it", found.net_gap_ms, "p99 1,000"),
        ("stream gap at SIGSTOP", found.hang_gap_ms, ""),
        ("death noticed", found.death_notice_ms, "300"),
        ("hang noticed", found.hang_notice_ms, "3,500"),
        ("worker away after its death", found.absence_ms, "5,000"),
    )
    for name, figures, bar in rows:
        cells = [milliseconds(value) for value in (figures.p50, figures.p99, figures.max)]
        table.add_row(name, *cells, str(figures.count), bar)
    return table
