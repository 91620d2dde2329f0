"""Turns logits into tokens, for a whole step at once.

The order is the field's (vLLM's): raw log-probabilities are reported as the model gives them; then logit bias, the
bans (ends before min_tokens, last tokens of bad words), repetition, frequency and presence penalties, a grammar's mask,
temperature, min-p, top-k, top-p.

A draw depends on (seed, choice, output index) alone: their hash is one uniform number, and the token is where the
cumulative distribution, in token order, passes it. No generator has state, so a stream goes on the same after a
handoff, a preemption or a restart, and whatever else is in the batch. Rows that are plainly greedy, the common
case, cost one argmax together.

A row whose logits are no distribution (NaN or +inf among them, or nothing but -inf) yields no token. An argmax finds
NaN before anything else and +inf before any number, so its own value tells; what a temperature makes infinite shows in
the sum that is drawn from.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.batch import Batch
from ...common.request import SampledToken, SamplingParams
from .draws import draw
from .logprobs import Logprobs
from .seen import SeenTokens, Tokens


@dataclass(slots=True, frozen=True)
class SampleRow:
    """One row of logits and what is drawn from it: a token for each of `choices`."""

    params: SamplingParams
    choices: tuple[int, ...]
    token_ids: Sequence[int]  # prompt, then output
    num_prompt_tokens: int
    mask: bytes | None = None  # of a grammar: which tokens may come (`common.batch.GrammarMask`); None: all
    draft: tuple[int, ...] = ()  # drafted tokens behind them, as if they had been drawn
    ends_by_grammar: bool = True  # an end token ends the answer where the mask lets it come, though ends be ignored

    @property
    def output_index(self) -> int:
        """Return the index in the output of the token that is drawn."""
        return len(self.token_ids) + len(self.draft) - self.num_prompt_tokens

    @property
    def has_penalties(self) -> bool:
        return self.counts_output or self.params.repetition_penalty != 1

    @property
    def counts_output(self) -> bool:
        """Tell whether it is penalized by how often tokens came in the output."""
        return self.params.presence_penalty != 0 or self.params.frequency_penalty != 0

    def seen_tokens(self, seen: SeenTokens) -> Tokens:
        """Return all tokens before the one that is drawn."""
        return seen.of(self.token_ids, 0, self.draft)

    def output_tokens(self, seen: SeenTokens) -> Tokens:
        """Return those of them that are not the prompt's."""
        return seen.of(self.token_ids, self.num_prompt_tokens, self.draft)

    @property
    def forbids_end(self) -> bool:
        return self.output_index < self.params.min_tokens

    @property
    def edits_numbers(self) -> bool:
        """Tell whether more is done to its logits than a grammar's mask does."""
        return bool(self.params.logit_bias or self.params.bad_words) or self.forbids_end or self.has_penalties

    @property
    def edits_logits(self) -> bool:
        return self.edits_numbers or self.mask is not None

    @property
    def is_plain(self) -> bool:
        """Tell whether the best token is asked for and nothing else."""
        return self.params.is_greedy and self.params.logprobs is None and not self.edits_logits

    @property
    def uniforms(self) -> list[float]:
        """Return the number of each choice by which its token is drawn."""
        return [uniform(self.params.seed, choice, self.output_index) for choice in self.choices]

    def biases(self, vocab_size: int) -> dict[int, float]:
        """Return what is added to the logits of a vocabulary's tokens."""
        return {token: bias for token, bias in self.params.logit_bias.items() if 0 <= token < vocab_size}

    def banned(self, vocab_size: int, eos_token_ids: frozenset[int]) -> list[int]:
        """Return a vocabulary's tokens that may not come next: they would end the answer too early, or complete a bad
        word.
        """
        found = self._ends_of_bad_words()
        if self.forbids_end:
            found = found | eos_token_ids | set(self.params.stop_token_ids)
        elif self.params.ignore_eos and self.mask is not None and self.ends_by_grammar:
            found = found | eos_token_ids
        return [token for token in found if 0 <= token < vocab_size]

    def _ends_of_bad_words(self) -> Set[int]:
        if not self.params.bad_words:
            return frozenset()
        longest = max(map(len, self.params.bad_words))
        first = max(self.num_prompt_tokens, len(self.token_ids) + len(self.draft) + 1 - longest)
        before = (*self.token_ids[first:], *self.draft)
        return {run[-1] for run in self.params.bad_words if before[len(before) - len(run) + 1 :] == run[:-1]}

    def allowed_words(self, vocab_size: int, eos_token_ids: frozenset[int]) -> NDArray[np.uint32]:
        """Return the mask's words for a vocabulary, without what is banned.

        Where its grammar lets nothing else come, that comes all the same: the answer cannot go on.
        """
        assert self.mask is not None
        num_words = -(-vocab_size // 32)
        bits = bytearray(self.mask[: 4 * num_words].ljust(4 * num_words, b"\0"))
        for token_id in self.banned(vocab_size, eos_token_ids):
            bits[token_id >> 3] &= ~(1 << (token_id & 7))
        words = np.frombuffer(bits, np.dtype("<u4"))
        return words if words.any() else np.frombuffer(self.mask.ljust(4 * num_words, b"\0"), "<u4", num_words)


def sample_rows(batch: Batch) -> list[SampleRow]:
    """List what is drawn from the logits of each row that samples: after its last known token, and each drafted one."""
    rows = [row for row in batch.rows if row.samples]
    masks = batch.masks() if batch.masks is not None else [None] * len(rows)
    drawn: list[SampleRow] = []
    for row, mask in zip(rows, masks, strict=True):
        seq, words = row.seq, () if mask is None else (mask.words, *mask.behind_draft)
        for end in range(1 + len(row.draft)):  # where a mask is missing, what is drawn does not count
            draft, allowed = row.draft[:end], words[end] if end < len(words) else None
            known = (seq.sampling, row.choices, seq.token_ids, seq.num_prompt_tokens)
            drawn.append(SampleRow(*known, allowed, draft, seq.ends_by_grammar))
    return drawn


def sample_each(
    logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int], seen: SeenTokens | None = None
) -> list[tuple[SampledToken, ...]]:
    """Do as `sample` does, each row for itself, on a CPU: its results are the same to the bit in any company."""
    best, seen = best_tokens(logits), SeenTokens() if seen is None else seen
    tokens = [
        plain_tokens(best[index], row)
        if row.is_plain
        else _sample(logits[index : index + 1].clone(), [row], eos_token_ids, seen)[0]
        for index, row in enumerate(rows)
    ]
    forget_others(seen, rows)
    return tokens


def forget_others(seen: SeenTokens, rows: Sequence[SampleRow]) -> None:
    """Forget the texts that no row of a step has."""
    seen.keep(row.token_ids for row in rows if row.has_penalties)


def plain_tokens(best: list[int], row: SampleRow) -> tuple[SampledToken, ...]:
    """Return the tokens of a plain row, of its best one."""
    return tuple([SampledToken(token_id) for token_id in best * len(row.choices)])


def sample(
    logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int], seen: SeenTokens | None = None
) -> list[tuple[SampledToken, ...]]:
    """Return the tokens of each row's choices, none where its logits are no distribution.

    `logits` [rows, vocab] float32 is overwritten where rows edit it. `seen`: of these rows' steps before; None: they
    have had none.
    """
    seen = SeenTokens() if seen is None else seen
    tokens = _sample(logits, rows, eos_token_ids, seen)
    forget_others(seen, rows)
    return tokens


def _sample(
    logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int], seen: SeenTokens
) -> list[tuple[SampledToken, ...]]:
    logprobs = _report_logprobs(logits, rows)
    for index, row in enumerate(rows):
        if row.edits_logits:
            edit_logits(logits[index], row, eos_token_ids, seen)
            mask_logits(logits[index], row, eos_token_ids)
    token_ids = _choose(logits, rows)
    if logprobs is None:
        return [tuple([SampledToken(token_id) for token_id in ids]) for ids in token_ids]
    tokens = [logprobs.tokens(index, ids) for index, ids in enumerate(token_ids)]
    return [() if any(token.is_nan for token in of_row) else of_row for of_row in tokens]


def uniform(seed: int, choice: int, output_index: int) -> float:
    """Return a number in [0, 1): 53 bits of BLAKE2b over the counters (as counter-based generators do, Salmon 2011)."""
    counters = struct.pack("<Qqq", seed & (2**64 - 1), choice, output_index)
    digest = hashlib.blake2b(counters, digest_size=8, person=b"kvferry-draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _report_logprobs(logits: Tensor, rows: Sequence[SampleRow]) -> Logprobs | None:
    if all(row.params.logprobs is None for row in rows):
        return None
    return Logprobs(logits, [row.params.logprobs for row in rows])


# --- edits, in place on one row -------------------------------------------------------------------------------


def edit_logits(logits: Tensor, row: SampleRow, eos_token_ids: frozenset[int], seen: SeenTokens) -> None:
    """Do to one row all that its request asks for but its grammar's mask."""
    vocab_size = logits.shape[0]
    if biases := row.biases(vocab_size):
        logits[[*biases]] += torch.tensor([*biases.values()], device=logits.device)
    if row.mask is None and (banned := row.banned(vocab_size, eos_token_ids)):
        logits[banned] = float("-inf")
    if row.has_penalties:
        _penalize(logits, row, seen)


def mask_logits(logits: Tensor, row: SampleRow, eos_token_ids: frozenset[int]) -> None:
    """Let only those tokens come in one row that its grammar allows, if it has one."""
    if row.mask is None:
        return
    words = row.allowed_words(logits.shape[0], eos_token_ids)
    allowed = np.unpackbits(words.view(np.uint8), count=logits.shape[0], bitorder="little").view(np.bool_)
    np.copyto(logits.numpy(), -np.inf, where=~allowed)  # torch would wake its threads for every row


def _penalize(logits: Tensor, row: SampleRow, seen: SeenTokens) -> None:
    """Penalize seen tokens: repetition looks at prompt and output, frequency and presence at the output alone."""
    params = row.params
    if params.repetition_penalty != 1:
        at = torch.from_numpy(row.seen_tokens(seen)[0]).long()
        values, penalty = logits[at], params.repetition_penalty
        logits[at] = torch.where(values > 0, values / penalty, values * penalty)
    if row.counts_output and row.output_index:
        tokens, counts = map(torch.from_numpy, row.output_tokens(seen))
        logits[tokens.long()] -= params.frequency_penalty * counts + params.presence_penalty


# --- choosing -------------------------------------------------------------------------------------------------


def _choose(logits: Tensor, rows: Sequence[SampleRow]) -> list[list[int]]:
    """Token ids for each row's choices, none where logits are no distribution; greedy choices of one row are equal,
    random ones have draws of their own."""
    best = best_tokens(logits)
    chosen = [best[index] * len(row.choices) for index, row in enumerate(rows)]
    random = [index for index, row in enumerate(rows) if not row.params.is_greedy and chosen[index]]
    if random:
        whole = logits if len(random) == len(rows) else logits[random]
        temperatures = torch.tensor([rows[index].params.temperature for index in random]).unsqueeze(1)
        for index, probabilities in zip(random, torch.softmax(whole / temperatures, -1).numpy(), strict=True):
            chosen[index] = draw(probabilities, rows[index].params, rows[index].uniforms)
    return chosen


def best_tokens(logits: Tensor) -> list[list[int]]:
    """Return each row's best token, or nothing where its logits are no distribution. On a CPU."""
    values = logits.numpy()  # whose argmax is ten times quicker than torch's
    best = values.argmax(-1)
    largest: list[float] = values[np.arange(len(best)), best].tolist()
    token_ids: list[int] = best.tolist()
    return [[token_id] if math.isfinite(value) else [] for token_id, value in zip(token_ids, largest, strict=True)]
