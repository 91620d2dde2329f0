"""Lengths of prompts and answers within a model's context.

What it has no room for is refused by a router, where it is a prompt, and ended by a worker, where it is an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from ..common.errors import ConfigError
from ..tools.load.traces import TraceRow

TOO_LONG = "context_length_exceeded"  # as the router's answer calls it


def is_too_long(row: TraceRow, max_model_len: int) -> bool:
    """Say whether a router refuses the prompt: it and a first token, where an answer is wanted, do not fit."""
    return row.num_prompt_tokens + min(1, row.num_output_tokens) > max_model_len


def cut(row: TraceRow, max_model_len: int) -> TraceRow:
    """Return it with as much of its answer as there is room for behind its prompt."""
    room = max_model_len - row.num_prompt_tokens
    return row if row.num_output_tokens <= room else replace(row, num_output_tokens=room)


def count_too_long(rows: Iterable[TraceRow], max_model_len: int) -> int:
    return sum(is_too_long(row, max_model_len) for row in rows)


def with_means(
    rows: Sequence[TraceRow], prompt: int | None, output: int | None, max_model_len: int
) -> tuple[TraceRow, ...]:
    """Return the rows made longer or shorter, so that they have these means within the context; None: as they are.

    Half of the context is the most that an answer has of it. Raises ConfigError where no lengths have such a mean.
    """
    outputs, _ = _with_mean(
        "output_len", [row.num_output_tokens for row in rows], output, [max_model_len // 2] * len(rows)
    )
    rooms = [max_model_len - count for count in outputs]
    prompts, scale = _with_mean("context", [row.num_prompt_tokens for row in rows], prompt, rooms)
    return tuple(
        replace(row.scaled(length=scale, rate=1.0), num_prompt_tokens=num_prompt, num_output_tokens=num_output)
        for row, num_prompt, num_output in zip(rows, prompts, outputs, strict=True)
    )


def _with_mean(name: str, counts: list[int], wanted: int | None, rooms: list[int]) -> tuple[list[int], float]:
    """Return the counts times one factor, as far as each has room, and that factor: it makes up for what is cut."""

    def scaled(scale: float) -> list[int]:
        return [min(max(1, round(count * scale)), room) for count, room in zip(counts, rooms, strict=True)]

    if wanted is None:
        return scaled(1.0), 1.0
    if wanted > (most := round(fmean(rooms))):
        raise ConfigError(
            f"{name}: {wanted:,} tokens are more than the model's context has room for: {most:,} at most, on average"
        )
    counts = [max(1, count) for count in counts]  # of none, any factor makes none
    low, high = 0.0, float("inf")
    scale = wanted / fmean(counts)
    while abs(found := fmean(scaled(scale)) - wanted) > 0.5:  # whole tokens come no nearer
        low, high = (scale, high) if found < 0 else (low, scale)
        scale = 2 * scale if high == float("inf") else (low + high) / 2
    return scaled(scale), scale
