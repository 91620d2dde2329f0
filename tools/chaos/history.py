"""A history is what clients saw of a run; the checker says whether a server that loses nothing may show that. Pure.

    python -m kvferry.tools.chaos.history FILE      checks the file that `kvferry chaos --history FILE` wrote

Requests that were sent while nobody was disturbed are references; the others repeat one of them and must get the same
answer.

I6  tokens of a choice come once, in order, without a gap; nothing after the finish reason
I8  every request ends once, and in a way that its client can tell: all finish reasons and [DONE], or a proper error
I9  usage counts the tokens that were delivered, and the router has exactly one row for the request which says the same
EQ  text, calls, tokens, log probabilities, finish and stop reasons equal the reference's; what came before its client
    left is the beginning of it
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...common.errors import ConfigError
from .events import Cut, Delta, Done, Failed, History, Left, Note, Request, Usage, read_history

NATURAL_ENDS = ("stop", "length", "tool_calls")
_ENDS = (Done, Failed, Cut, Left)


@dataclass(slots=True, frozen=True)
class Breach:
    """One promise that was broken."""

    rule: str
    request: int
    text: str

    def __str__(self) -> str:
        return f"{self.rule} request {self.request}: {self.text}"


@dataclass(slots=True)
class Verdict:
    """The judgement of one request."""

    breaches: list[Breach] = field(default_factory=list)
    is_lost: bool = False  # ended without finish reason or proper error, or not at all
    num_repeated: int = 0  # tokens that the reference does not have at that place
    num_missing: int = 0
    num_changed: int = 0
    num_tokens: int = 0


def judge(request: Request, reference: Request | None = None) -> Verdict:
    """Check one request that is over; `reference`: the same one undisturbed."""
    verdict = Verdict(num_tokens=sum(len(choice.token_ids) for choice in request.answer()))
    found = verdict.breaches
    for rule, text in (*_check_order(request), *_check_end(request), *_check_usage(request)):
        found.append(Breach(rule, request.number, text))
    failure = request.failure
    verdict.is_lost = not request.is_done and not request.has_left and (failure is None or not failure.code)
    if reference is not None and (request.is_done or request.has_left):
        differences = _compare(request, reference, verdict) if request.is_done else _compare_begun(request, reference)
        found += [Breach("EQ", request.number, text) for text in differences]
    return verdict


def _check_order(request: Request) -> Iterable[tuple[str, str]]:
    ended: set[int] = set()
    num_tokens: Counter[int] = Counter()
    last_offset: dict[int, int] = {}
    for event in request.events:
        if not isinstance(event, Delta):
            continue
        if not 0 <= event.choice < request.sent.num_choices:
            yield "I6", f"choice {event.choice} of {request.sent.num_choices}"
        if event.choice in ended:
            yield "I6", f"choice {event.choice} goes on after its finish reason: {event.text!r} {event.token_ids}"
        for offset in event.offsets:
            if offset < last_offset.setdefault(event.choice, 0):
                yield "I6", f"choice {event.choice} goes back from character {last_offset[event.choice]} to {offset}"
            last_offset[event.choice] = offset
        num_tokens[event.choice] += len(event.token_ids)
        if event.finish is not None:
            ended.add(event.choice)
    for choice, count in num_tokens.items():
        if count > request.sent.max_tokens:
            yield "I6", f"choice {choice} has {count} tokens, {request.sent.max_tokens} were asked for"


def _check_end(request: Request) -> Iterable[tuple[str, str]]:
    ends = [event for event in request.events if isinstance(event, _ENDS)]
    if not ends:
        yield "I8", "never ended"
        return
    if len(ends) > 1:
        yield "I8", f"ended {len(ends)} times: {', '.join(type(end).__name__ for end in ends)}"
    if request.events[-1] is not ends[-1]:
        yield "I8", f"{type(request.events[-1]).__name__} after its end"
    match ends[0]:
        case Cut(why=why):
            yield "I8", f"cut off: {why}"
        case Failed(code="", status=status, message=message):
            yield "I8", f"ended with no proper error: {status} {message[:200]}"
        case Done():
            yield from _check_finishes(request)


def _check_finishes(request: Request) -> Iterable[tuple[str, str]]:
    finishes: Counter[int] = Counter()
    for event in request.events:
        if isinstance(event, Delta) and event.finish is not None:
            finishes[event.choice] += 1
            if event.finish not in NATURAL_ENDS:
                yield "I8", f"choice {event.choice} ended by {event.finish!r}"
    for choice in range(request.sent.num_choices):
        if finishes[choice] != 1:
            yield "I8", f"[DONE], and choice {choice} has {finishes[choice]} finish reasons"


def _check_usage(request: Request) -> Iterable[tuple[str, str]]:
    if not request.is_done:
        return
    usages = [event for event in request.events if isinstance(event, Usage)]
    if len(usages) != 1:
        yield "I9", f"{len(usages)} reports of usage"
        return
    delivered = sum(len(event.token_ids) for event in request.events if isinstance(event, Delta))
    if request.sent.tells_tokens and usages[0].num_completion_tokens != delivered:
        yield "I9", f"usage says {usages[0].num_completion_tokens} tokens, {delivered} were delivered"


def _compare(request: Request, reference: Request, verdict: Verdict) -> Iterable[str]:
    for number, (got, wanted) in enumerate(zip(request.answer(), reference.answer(), strict=True)):
        if got.token_ids != wanted.token_ids:
            yield f"choice {number}: {_count_difference(got.token_ids, wanted.token_ids, verdict)}"
        for name in ("text", "calls", "logprobs", "finish", "stop_reason"):
            ours, theirs = getattr(got, name), getattr(wanted, name)
            if ours != theirs:
                yield f"choice {number}: {name} {_first_difference(ours, theirs)}"
    if request.usage is not None and reference.usage is not None:
        for name in ("num_prompt_tokens", "num_completion_tokens"):
            ours, theirs = getattr(request.usage, name), getattr(reference.usage, name)
            if ours != theirs:
                yield f"{name} {ours} is not {theirs}"


def _compare_begun(request: Request, reference: Request) -> Iterable[str]:
    for number, (got, wanted) in enumerate(zip(request.answer(), reference.answer(), strict=True)):
        for name in ("token_ids", "text", "calls", "logprobs"):
            ours, theirs = getattr(got, name), getattr(wanted, name)
            if ours != theirs[: len(ours)]:
                yield f"choice {number}: {name} {_first_difference(ours, theirs)}"
        if got.finish is not None and (got.finish, got.stop_reason) != (wanted.finish, wanted.stop_reason):
            yield f"choice {number}: finish {_first_difference(got.finish, wanted.finish)}"


def _count_difference(got: Sequence[int], wanted: Sequence[int], verdict: Verdict) -> str:
    missing = repeated = changed = 0
    for what, i, j, k, m in difflib.SequenceMatcher(None, wanted, got, autojunk=False).get_opcodes():
        missing += j - i if what == "delete" else max(0, (j - i) - (m - k)) if what == "replace" else 0
        repeated += m - k if what == "insert" else max(0, (m - k) - (j - i)) if what == "replace" else 0
        changed += min(j - i, m - k) if what == "replace" else 0
    verdict.num_missing += missing
    verdict.num_repeated += repeated
    verdict.num_changed += changed
    first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return f"{missing} tokens missing, {repeated} too many, {changed} changed, from token {first} of {len(wanted)} on"


def _first_difference(got: object, wanted: object) -> str:
    if isinstance(got, str | list) and isinstance(wanted, str | list):
        first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        if first is not None:
            return f"differs at {first} of {len(wanted)}: {got[first]!r} is not {wanted[first]!r}"
    return f"{str(got)[-60:]!r} is not {str(wanted)[-60:]!r}"


class Counted(NamedTuple):
    """The tokens and texts that a client counted of an answer."""

    request: int
    answer_id: str
    num_completion_tokens: int
    is_background: bool = False


def counted(request: Request) -> Counted | None:
    """None: it was not answered."""
    usage = request.usage
    if usage is None or not request.is_done:
        return None
    return Counted(request.number, request.answer_id, usage.num_completion_tokens, request.sent.is_background)


def check_rows(answers: Iterable[Counted], notes: Iterable[Note]) -> list[Breach]:
    """Each answer has one `request_finished` row of the router, with the tokens that its client counted.

    One that nobody waits for has one of each router that had a part in it: the last counts. So it does where a client
    came back for an answer which had been told already when its router died.
    """
    rows: dict[str, list[object]] = {}
    for note in notes:
        if note.what == "request_finished":
            mine = rows.setdefault(note.answer_id, [])
            if note.detail.get("repeated_tokens"):
                mine.clear()
            mine.append(note.detail.get("completion_tokens"))
    found = []
    for answer in answers:
        mine = rows.get(answer.answer_id, [])[-1 if answer.is_background else 0 :]
        if len(mine) != 1:
            found.append(Breach("I8", answer.request, f"the router has {len(mine)} rows for {answer.answer_id}"))
        elif mine[0] != answer.num_completion_tokens:
            text = f"the router counts {mine[0]} tokens, usage {answer.num_completion_tokens}"
            found.append(Breach("I9", answer.request, text))
    return found


def judge_all(history: History) -> dict[int, Verdict]:
    """Judge every request that was sent while workers died."""
    references = history.references()
    return {request.number: judge(request, references.get(request.sent.ask)) for request in history.disturbed()}


def breaches_of(history: History) -> list[Breach]:
    found = [breach for verdict in judge_all(history).values() for breach in verdict.breaches]
    return found + check_rows(filter(None, map(counted, history.disturbed())), history.notes)


def num_compared(history: History) -> int:
    """Count the answers that have an undisturbed one to be held against."""
    references = history.references()
    return sum(request.is_done and request.sent.ask in references for request in history.disturbed())


def main(argv: Sequence[str]) -> int:
    """0: nothing was broken; 1: something was; 2: no file with the history of a run, or nothing to compare in it."""
    if len(argv) != 1:
        print("usage: python -m kvferry.tools.chaos.history FILE", file=sys.stderr)
        return 2
    try:
        history = read_history(Path(argv[0]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    breaches, compared = breaches_of(history), num_compared(history)
    for breach in breaches:
        print(breach)
    print(f"{len(history.requests)} requests, {compared} compared with undisturbed ones, {len(breaches)} breaches")
    if not breaches and not compared:
        print(f"{argv[0]} shows nothing: no answer can be compared with an undisturbed one", file=sys.stderr)
        return 2
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
