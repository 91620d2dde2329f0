"""`Speculation` chooses how many drafted tokens a step verifies, for each sequence.

    proposer ─> draft ─> cut to what pays ─> a row that verifies ─> run of accepted tokens

A draft of k tokens is right up to its j-th token with chance r^j, r being how often this sequence's drafts were right.
Each fed token costs a part of a step's time. Drafts are added, the likeliest first, while they raise the tokens that a
second yields: (E + r^j) / (T + c) > E / T. None is a choice like any other. This is the expected-throughput rule of
speculative decoding (Leviathan 2023, section 3) for batches. A draft model takes a part of a step's time besides, for
each token of the longest draft: so many depths are chosen as raise it the most.

Looking for a draft takes time, too, while the step waits. So it is done for the sequences whose drafts are right often
enough to pay for it, and for others now and then, as far as that takes a small part of a step: texts change.

A layer's keys and values of wrong tokens are written over; a state cannot be taken back. So where layers keep states, a
row leaves the state behind its known tokens alone, and those of its draft that were right are fed once more in the next
step, before that step's draft: c is then c (1 + r^j).

Nothing here decides which tokens come: a wrong estimate costs time alone. Pure; times come in with the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from msgspec import Struct

from ..common.batch import UNDRAFTED, Batch, BatchRow, RowKind, StepOutput
from ..common.clock import Clock
from ..common.config import SpeculativeConfig
from ..common.request import Sequence
from .draft_spans import DraftSpans
from .draft_track import FORGIVING, Track
from .ngrams import NgramProposer, Proposer
from .suffixes import EarlierAnswers, SuffixProposer, owner_of, said

_FIRST_SHARE = 0.05  # of a step, that one more fed token costs: a step of one row that reads all weights
_FIRST_ROWS_SHARE = 0.25  # of a step, that one more token of every row costs at most: many rows share what they read
_FIRST_DEPTH_SHARE = 0.2  # of a step, that a draft model takes for one more token: a model of a fifth of the weights
_COST_SMOOTHING = 0.1
_FORGETTING = 0.99  # of a cost's excess over the first guess, with each step without drafts: a slow step is forgiven
_PLAIN_EVERY = 64  # steps: one without drafts, so that their time stays known
_TRIAL_SHARE = 0.02  # of a step, in which drafts are looked for that are not expected to pay
_OUTLIER = 2.0  # times what is known: a pause in a search is not what searching takes
_RATE_STEPS = 10  # of halving, to find the least rate that pays: to a thousandth


class DraftCounters(Struct):
    """Figures since the start, under the names that `WorkerStatus` gives them."""

    draft_tokens: int = 0  # that were fed
    accepted_tokens: int = 0
    draft_prompt_tokens: int = 0  # of prompts, that a draft model has computed here


@dataclass(slots=True)
class StepCosts:
    """`StepCosts` learns what decode steps take, and what each drafted token adds to one."""

    plain_s: dict[int, float] = field(default_factory=dict)  # rows -> seconds of a step without drafts
    share: float = _FIRST_SHARE  # of such a step, for each drafted token
    depth_share: float = 0.0  # of such a step, that a draft model takes for one token of all rows; 0: there is none
    search_s: float = 0.0  # to search for one sequence's draft

    def learn_search(self, seconds: float) -> None:
        """Learn from what one search took."""
        known = self.search_s
        self.search_s = known + _COST_SMOOTHING * (min(seconds, _OUTLIER * known) - known) if known else seconds

    def search_share(self, num_rows: int) -> float:
        """Return what searching for a draft for each of so many rows takes, in plain steps of them."""
        plain_s = self.plain_s[num_rows]
        return num_rows * self.search_s / plain_s if plain_s > 0 else 0.0

    def least_rate(self, num_rows: int, time: float, depth: int, *, feeds_again: bool) -> float:
        """Return a rate at or below which no draft of up to `depth` tokens pays for the search for it.

        `time`: of the step without it, in plain steps of so many rows, whose time is known.
        """
        low, high, search = 0.0, 1.0, self.search_share(num_rows)
        for _ in range(_RATE_STEPS):
            rate = (low + high) / 2
            gain, chance = -search, 1.0
            for _ in range(depth):
                chance *= rate
                more = chance * time - num_rows * self.share * (1 + chance if feeds_again else 1)
                if more <= 0:
                    break
                gain += more
            low, high = (low, rate) if gain > 0 else (rate, high)
        return low

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step that had no chunks."""
        if not batch.rows or batch.rows[-1].kind is RowKind.CHUNK:
            return
        seconds, num_rows = output.step_s - output.swap_s - output.draft_s, len(batch.rows)
        known, num_more = self.plain_s.get(num_rows), batch.num_tokens - num_rows
        if not num_more:
            self.plain_s[num_rows] = seconds if known is None else known + _COST_SMOOTHING * (seconds - known)
            # Only what is dear is not tried again: what is held to be too cheap is, and so found out.
            first = min(_FIRST_SHARE, _FIRST_ROWS_SHARE / num_rows)
            self.share += (1 - _FORGETTING) * min(0.0, first - self.share)
            if self.depth_share:
                self.depth_share += (1 - FORGIVING) * (_FIRST_DEPTH_SHARE - self.depth_share)
        elif known and seconds > 0:
            seen = max(0.0, min(seconds / known - 1, 2.0)) / num_more
            self.share += _COST_SMOOTHING * (seen - self.share)
            if self.depth_share and batch.has_drafts:
                # Of one step, as a slow machine is slow for both; one step doubles nothing, as a pause may be in it.
                depth_s = output.draft_s / max(len(row.draft) for row in batch.rows)
                seen = depth_s / seconds * (1 + num_more * self.share)
                self.depth_share *= 1 + _COST_SMOOTHING * min(seen / self.depth_share - 1, 1.0)


class _ByModel:
    """The engine's draft model says the tokens, when the step runs. Implements `Proposer`."""

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        return (UNDRAFTED,) * num_tokens


class Speculation:
    """`Speculation` gives rows their drafts and learns from what became of them."""

    def __init__(
        self,
        config: SpeculativeConfig,
        max_model_len: int,
        make_proposer: Callable[[Sequence], Proposer] | None = None,
        *,
        block_size: int = 1,
        keeps_states: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """`make_proposer`: another than the config's method, for one sequence. `block_size`: a draft model asks.
        `keeps_states`: some layers do, and what is accepted is fed again. `clock`: measures what searching for drafts
        takes; None: that is nothing.
        """
        self.keeps_states = keeps_states
        self._config = config
        has_model = config.method == "draft_model"
        self.make_proposer = make_proposer if make_proposer is not None else self._by_method
        self._earlier: EarlierAnswers | None = None
        if config.method == "suffix":
            self._earlier = EarlierAnswers(config.prompt_lookup_min, config.suffix_decoding_max_cached_requests)
        self._spans = DraftSpans(block_size) if has_model else None
        self._max_model_len = max_model_len
        self._tracks: dict[Sequence, Track] = {}
        self.costs = StepCosts(depth_share=_FIRST_DEPTH_SHARE if has_model else 0.0)
        self.counters = DraftCounters()
        self._now = clock.now if clock is not None else float
        self._num_steps = self._num_tracks = 0

    def draft(self, rows: Iterable[BatchRow], budget: int, make_room: Callable[[Sequence, int], int]) -> None:
        """Give drafts to rows that decode, `budget` tokens at most.

        `make_room(seq, n)` returns how many tokens after the next one have slots for their KV, up to n.
        """
        if self._earlier is not None:
            self._earlier.take_in()
        decoding = [row for row in rows if row.kind is RowKind.DECODE and row.samples and not row.seq.pending_choices]
        self._num_steps += 1
        if self._num_steps % _PLAIN_EVERY == 0 or len(decoding) not in self.costs.plain_s:
            return
        drafts = self._proposed(decoding)
        lengths = self._lengths(drafts, decoding, budget) if drafts else {}
        for row in decoding:
            wanted = lengths.get(row.seq, 0)
            if wanted and (length := make_room(row.seq, wanted)):
                row.draft = drafts[row.seq][:length]
                row.num_scheduled_tokens += length

    def assign(self, rows: Iterable[BatchRow]) -> None:
        """Say what a draft model computes in a step of these rows."""
        if self._spans is not None:
            self._spans.assign(rows)

    def _by_method(self, seq: Sequence) -> Proposer:
        if self._spans is not None:
            return _ByModel()
        if self._earlier is not None:
            return SuffixProposer(self._config, self._earlier, owner_of(seq))
        return NgramProposer(self._config.prompt_lookup_min, self._config.prompt_lookup_max)

    def _proposed(self, decoding: list[BatchRow]) -> dict[Sequence, tuple[int, ...]]:
        """Return drafts for those of which some would pay, and for a few others, whose drafts may be right by now."""
        costs, drafts = self.costs, dict[Sequence, tuple[int, ...]]()
        num_rows, least, every = len(decoding), -1.0, 1
        if self._spans is None:
            time = 1 + costs.share * (sum(row.num_scheduled_tokens for row in decoding) - num_rows)
            if time <= num_rows * costs.share * (2 if self.keeps_states else 1):  # not even what is surely right
                return drafts
            depth = self._config.num_speculative_tokens
            least = costs.least_rate(num_rows, time, depth, feeds_again=self.keeps_states)
            every = max(1, math.ceil(costs.search_share(num_rows) / _TRIAL_SHARE))
        for row in decoding:
            track = self._track(row.seq)
            is_trial = (self._num_steps + track.number) % every == 0
            if (track.rate > least or is_trial) and (draft := self._propose(track, row.seq)):
                drafts[row.seq] = draft
        return drafts

    def _track(self, seq: Sequence) -> Track:
        """Return what is known of a sequence's drafts, with what has come judged."""
        track = self._tracks.get(seq)
        if track is None:
            self._num_tracks += 1
            track = self._tracks[seq] = Track(self.make_proposer(seq), self._num_tracks)
        elif self._spans is None:  # else nothing was said yet: what was verified is judged
            track.judge(seq.token_ids)
        return track

    def _propose(self, track: Track, seq: Sequence) -> tuple[int, ...]:
        left = min(seq.sampling.max_tokens - seq.num_output_tokens, self._max_model_len - seq.num_tokens) - 1
        begun_s, is_reading = self._now(), track.is_reading
        draft = track.propose(seq.token_ids, min(self._config.num_speculative_tokens, left, seq.draft_limit))
        if not is_reading:  # that is done once for a prompt, and takes far longer than a search
            self.costs.learn_search(self._now() - begun_s)
        return draft

    def _lengths(
        self, drafts: dict[Sequence, tuple[int, ...]], decoding: list[BatchRow], budget: int
    ) -> dict[Sequence, int]:
        """Cut the drafts to what raises the tokens of a second."""
        gains = sorted(
            (
                (self._tracks[seq].rate ** (place + 1), place, seq)
                for seq, draft in drafts.items()
                for place in range(len(draft))
            ),
            key=lambda gain: (-gain[0], gain[1]),
        )
        if self._spans is None:
            return self._fill(gains[:budget], decoding, 0)[1]
        longest = max(map(len, drafts.values()))
        options = [
            self._fill([gain for gain in gains if gain[1] < depth][:budget], decoding, depth)
            for depth in range(longest + 1)
        ]
        return max(options, key=lambda option: option[0])[1]

    def _fill(
        self, gains: list[tuple[float, int, Sequence]], decoding: list[BatchRow], depth: int
    ) -> tuple[float, dict[Sequence, int]]:
        """Take gains, the largest first, as long as they pay in a step that drafts `depth` tokens by a model.

        Returns tokens by time, which is in plain steps, and the drafts' lengths.
        """
        share, num_rows = self.costs.share, len(decoding)
        num_again = sum(row.num_scheduled_tokens for row in decoding) - num_rows
        num_tokens, time = float(num_rows), 1.0 + depth * self.costs.depth_share + num_again * share
        lengths: dict[Sequence, int] = {}
        for gain, _, seq in gains:
            cost = share * (1 + gain) if self.keeps_states else share  # what is right is fed again
            if gain * time <= num_tokens * cost:
                break
            num_tokens, time = num_tokens + gain, time + cost
            lengths[seq] = lengths.get(seq, 0) + 1
        return num_tokens / time, lengths

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step."""
        self.costs.observe(batch, output)
        for row, result in zip(batch.rows, output.rows, strict=True):
            if row.draft and not result.is_postponed:
                self.counters.draft_tokens += len(row.draft)
                self.counters.accepted_tokens += sum(map(len, result.runs)) - len(result.runs)
        if self._spans is not None:
            self._spans.observe(batch)
            self.counters.draft_prompt_tokens = self._spans.num_prompt_tokens
            for row, result in zip(batch.rows, output.rows, strict=True):
                if (track := self._tracks.get(row.seq)) is not None:
                    track.judge_verified(row, result)

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a sequence that has ended; its answer may draft for others."""
        self._tracks.pop(seq, None)
        if self._earlier is not None:
            self._earlier.add(owner_of(seq), said(seq, self._config.suffix_decoding_max_tree_depth))
        if self._spans is not None:
            self._spans.forget(seq)
