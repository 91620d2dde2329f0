"""An upper bound of the goodput of so many GPUs, which no router can beat: from perfect knowledge and a fluid.

Prompts cost their arithmetic alone, at the largest step, less what an infinite cache over all workers would have held.
Answers cost their share of decode steps at the batch that yields the most tokens per second within the objective for
TPOT and within the worker's memory. Workers are divisible, nothing queues, nothing is shipped, no token comes late.

Of all requests only a share must be served (`share`); the bound takes the cheapest of them. Prompts that the model's
context has no room for are never among these.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import ConfigError
from ..kvcache.frames import frames_of
from ..sizing.steps import StepModel, StepWork
from ..tools.load.traces import TraceRow
from .lengths import cut, is_too_long
from .scenario import Scenario
from .setup import kv_spec
from .traffic import arrivals


@dataclass(slots=True, frozen=True)
class Bound:
    """The bound of one scenario's traffic and fleet."""

    rate_per_s: float  # of arrivals, at which the share of them, or what fits if less, could still be served
    goodput_per_s: float  # that part of it
    prefill_s: float  # worker seconds of a mean request that is served
    decode_s: float
    hit_rate: float  # of the infinite cache, over the prompts' tokens

    @property
    def prefill_share(self) -> float:
        """Return the share of the workers that would compute prompts."""
        return self.prefill_s / (self.prefill_s + self.decode_s)


def bound(scenario: Scenario, *, share: float = 0.9) -> Bound:
    fleet, steps = scenario.fleet, scenario.fleet.step_model()
    asked = [row for _, row in arrivals(scenario.traffic)]
    rows = [cut(row, fleet.max_model_len) for row in asked if not is_too_long(row, fleet.max_model_len)]
    if not rows:
        raise ConfigError(f"the trace's prompts are all too long for the model's {fleet.max_model_len:,} tokens")
    cached = infinite_cache(rows)
    block_tokens = fleet.block_tokens_of(rows[0])
    num_blocks, kv = fleet.blocks(block_tokens), kv_spec(fleet.shape, block_tokens)
    costs = []
    for row, hit in zip(rows, cached, strict=True):
        prefill_s = _prompt_s(steps, row.num_prompt_tokens, hit, fleet.prefill_tokens)
        context = row.num_prompt_tokens + row.num_output_tokens / 2
        held = max(context / block_tokens, -(-row.num_prompt_tokens // block_tokens))  # whole blocks, from the start
        if fleet.prefill:  # but what is handed over thin, as much as has a whole one's memory
            num_thin = kv.num_left_out(row.num_prompt_tokens)
            held -= num_thin - frames_of(kv).num_frames(num_thin, num_thin)
        token_s = _token_s(steps, context, scenario.goals.tpot_s, min(fleet.max_num_seqs, num_blocks / held))
        costs.append((prefill_s, max(0, row.num_output_tokens - 1) * token_s))
    served = sorted(costs, key=sum)[: max(1, round(share * len(asked)))]
    prefill_s, decode_s = (sum(cost[part] for cost in served) / len(served) for part in (0, 1))
    goodput = fleet.num_workers / (prefill_s + decode_s)
    hit_rate = sum(cached) / sum(row.num_prompt_tokens for row in rows)
    return Bound(goodput / min(share, len(rows) / len(asked)), goodput, prefill_s, decode_s, hit_rate)


def infinite_cache(rows: list[TraceRow]) -> list[int]:
    """Return, of each prompt, the tokens that a cache which never forgets would have held at its arrival."""
    seen: set[int] = set()
    found = []
    for row in rows:
        num_known = next((n for n, block in enumerate(row.block_ids) if block not in seen), len(row.block_ids))
        # The last token is always computed: its logits choose the first output token.
        most = (row.num_prompt_tokens - 1) // row.block_tokens
        found.append(min(num_known, most) * row.block_tokens)
        seen.update(row.block_ids)
    return found


def _prompt_s(steps: StepModel, num_tokens: int, num_cached: int, step_tokens: int) -> float:
    """Return a prompt's share of full steps (seconds): all of a step's prompts share its constant."""
    new = num_tokens - num_cached
    pairs = new * (num_cached + new // 2)
    constant_s = steps.step_s(StepWork(1, 0))
    filler = max(0, step_tokens - new)
    together_s = steps.step_s(StepWork(new + filler, pairs))
    alone_s = steps.step_s(StepWork(filler, 0)) if filler else constant_s
    return max(0.0, together_s - alone_s)


def _token_s(steps: StepModel, context: float, tpot_s: float, most_rows: float) -> float:
    """Return one row's share of a step with as many rows as memory and the objective allow (seconds)."""
    rows, best = 1, float("inf")
    while rows <= max(1, int(most_rows)):
        step_s = steps.step_s(StepWork(0, 0, rows, int(rows * context)))
        if step_s > tpot_s and rows > 1:
            break
        best = min(best, step_s / rows)
        rows += max(1, rows // 16)
    return best
