"""Turns logits into tokens on a GPU: the rules of `engine/sampling/sampling.py`, without waiting for the device.

    launch: edits -> best and drawn tokens, log-probabilities -> one array of int32 on its way to the host
    Draws.read, once that has come: SampledTokens

The host makes what is small and follows from requests alone (edits of logits, temperatures, the counter-based uniform
numbers of `sampling.uniform`) and uploads it; the device does what goes over the vocabulary. A token is where the
cumulative distribution passes the uniform number, as on the host, so a seeded stream goes on the same on either, but
for a number that falls within rounding of a border. Nothing is read back before all is queued.

A row whose logits are no distribution (`sampling`) is known by its largest one, as it was or over the temperature. It
draws from zeros, for kernels may search for ever among NaN, and the host drops what it drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...common.request import SampledToken
from ..sampling.sampling import SampleRow
from ..sampling.seen import SeenTokens
from .edits import Edits, SeenPlaces, collect_edits
from .kernels import Kernels

_CHUNK = 256  # tokens; their sums are looked through before the tokens are
_MIN_TOP_P = 1e-6  # keeps the best token


class Draws(NamedTuple):
    """One launch's yield. `token_ids` is on the device, `packed` is on its way to the host."""

    token_ids: Tensor  # [rows, most choices] int64
    # [n] int32 on the host: token ids, whose logits are a distribution, log-probabilities, best ids, log-probabilities
    packed: Tensor
    rows: Sequence[SampleRow]
    reported: list[int]  # rows that report log-probabilities
    num_best: int

    def read(self) -> list[tuple[SampledToken, ...]]:
        """Return each row's tokens, none where its logits are no distribution. The caller has waited for the device."""
        num_rows, most = self.token_ids.shape
        count, best = len(self.reported), self.num_best
        sizes = [num_rows * most, num_rows, count * most, count * best, count * best]
        packed_ids, is_finite, *reports = torch.split(self.packed, sizes)
        ids: list[list[int]] = packed_ids.view(num_rows, most).tolist()
        tokens = [
            tuple([SampledToken(token_id) for token_id in row_ids[: len(row.choices)]])
            for row_ids, row in zip(ids, self.rows, strict=True)
        ]
        if self.reported:
            self._report(tokens, ids, *reports)
        return [
            of_row if is_known and not any(token.is_nan for token in of_row) else ()
            for of_row, is_known in zip(tokens, is_finite.tolist(), strict=True)
        ]

    def _report(
        self,
        tokens: list[tuple[SampledToken, ...]],
        ids: list[list[int]],
        chosen: Tensor,
        best_ids: Tensor,
        best_values: Tensor,
    ) -> None:
        most, count, best = self.token_ids.shape[1], len(self.reported), self.num_best
        values = chosen.view(torch.float32).view(count, most).tolist()
        top_ids = best_ids.view(count, best).tolist()
        top_values = best_values.view(torch.float32).view(count, best).tolist()
        for slot, index in enumerate(self.reported):
            wanted = self.rows[index].params.logprobs or 0
            top = tuple(zip(top_ids[slot][:wanted], top_values[slot][:wanted], strict=True))
            tokens[index] = tuple(
                [
                    SampledToken(token_id, value, top)
                    for token_id, value, _ in zip(ids[index], values[slot], self.rows[index].choices, strict=False)
                ]
            )


class DeviceSampler:
    """Owned by the engine's thread; whatever it queues is in the order of the current stream."""

    def __init__(self, device: torch.device, kernels: Kernels, eos_token_ids: frozenset[int]) -> None:
        self._device = device
        self._kernels = kernels
        self._eos_token_ids = eos_token_ids
        self._seen = SeenTokens()

    def launch(self, logits: Tensor, rows: Sequence[SampleRow]) -> Draws:
        """Queue everything. `logits` [rows, vocab] float32 is overwritten where rows edit it."""
        reported = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        num_best = max((rows[index].params.logprobs or 0 for index in reported), default=0)
        where = self._index(reported) if 0 < len(reported) < len(rows) else slice(None)
        raw = torch.log_softmax(logits[where], -1) if reported else None  # before the edits
        self._edit(logits, rows)
        token_ids, is_finite = self._choose(logits, rows)
        parts = [token_ids.to(torch.int32).flatten(), is_finite.to(torch.int32).flatten()]
        if raw is not None:
            best = raw.topk(min(num_best, raw.shape[1]))
            parts.append(raw.gather(1, token_ids[where]).flatten().view(torch.int32))
            parts += [best.indices.to(torch.int32).flatten(), best.values.flatten().view(torch.int32)]
        return Draws(token_ids, self._to_host(torch.cat(parts)), rows, reported, min(num_best, logits.shape[1]))

    # --- to and from the device -------------------------------------------------------------------------------

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        """Copy from pinned memory, which torch keeps for the copy until it is done."""
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return self._upload(np.array(rows, np.int64))

    def _to_host(self, packed: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return packed
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        return host.copy_(packed, non_blocking=True)

    # --- edits ------------------------------------------------------------------------------------------------

    def _edit(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        edits = collect_edits(rows, logits.shape[1], self._eos_token_ids, self._seen)
        if edits is not None:
            self._add(logits, edits)
        masked = [index for index, row in enumerate(rows) if row.mask is not None]
        if masked:
            self._mask(logits, rows, masked)

    def _mask(self, logits: Tensor, rows: Sequence[SampleRow], masked: list[int]) -> None:
        """Let only those tokens come that the grammars of the rows `masked` allow. Words go up, bits stay there."""
        vocab_size = logits.shape[1]
        words = [rows[index].allowed_words(vocab_size, self._eos_token_ids) for index in masked]
        uploaded = self._upload(np.stack(words).astype("<u4", copy=False).view(np.int32))  # [masked, words]
        bits = (uploaded.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=self._device)) & 1
        is_banned = bits.view(len(masked), -1)[:, :vocab_size] == 0
        where = self._index(masked)
        logits[where] = logits[where].masked_fill(is_banned, float("-inf"))

    def _add(self, logits: Tensor, edits: Edits) -> None:
        biased, banned = edits.biased.at, edits.banned.at
        places = torch.split(self._upload(np.concatenate((biased, banned), 1)), [biased.shape[1], banned.shape[1]], 1)
        of_rows = (edits.bias, edits.repetition, edits.frequency, edits.presence)
        numbers = [np.array(values, np.float32) for values in of_rows] + [edits.counted.counts]
        bias, penalty, frequency, presence, counts = self._upload_parts(numbers)
        seen = self._upload_parts([*edits.repeated.arrays, *edits.counted.arrays])
        if edits.bias:
            logits[tuple(places[0])] += bias
        if banned.shape[1]:
            logits[tuple(places[1])] = float("-inf")
        if edits.repetition:
            index, at = self._seen_at(edits.repeated, *seen[:3])
            values, factor = logits[at], penalty[index]
            logits[at] = torch.where(values > 0, values / factor, values * factor)
        if edits.frequency:
            index, at = self._seen_at(edits.counted, *seen[3:])
            logits[at] -= frequency[index] * counts + presence[index]

    def _upload_parts(self, parts: Sequence[NDArray[np.generic]]) -> tuple[Tensor, ...]:
        return torch.split(self._upload(np.concatenate(parts)), [len(part) for part in parts])

    def _seen_at(
        self, places: SeenPlaces, rows: Tensor, ends: Tensor, tokens: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return of each token which of the penalized rows it is of, and where it stands among the logits."""
        each = torch.arange(places.num_tokens, dtype=torch.int32, device=self._device)
        index = torch.searchsorted(ends, each, right=True)
        return index, (rows[index].long(), tokens.long())

    # --- choosing ---------------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
        """[rows, most choices] int64 (what stands behind a row's own choices is of no meaning), and [rows, 1] bool:
        whose logits are a distribution."""
        most = max(len(row.choices) for row in rows)
        best = logits.argmax(-1, keepdim=True)
        largest = logits.gather(1, best)
        best = best.expand(-1, most)
        random = [index for index, row in enumerate(rows) if not row.params.is_greedy]
        if not random:
            return best, largest.isfinite()
        if len(random) == len(rows):
            return self._draw(logits, largest, rows, most)
        index = self._index(random)
        drawn, is_finite = self._draw(logits[index], largest[index], [rows[i] for i in random], most)
        return best.index_copy(0, index, drawn), largest.isfinite().index_copy(0, index, is_finite)

    def _draw(self, logits: Tensor, largest: Tensor, rows: Sequence[SampleRow], most: int) -> tuple[Tensor, Tensor]:
        """Choose tokens as `engine.sampling.sampling._draw` does. `largest` [rows, 1]: of each row's logits."""
        params, vocab_size = [row.params for row in rows], logits.shape[1]
        min_p = torch.tensor([p.min_p for p in params]).log().numpy()  # min_p = 0: -inf, keeps all
        top_p = [min(max(p.top_p, _MIN_TOP_P), 1.0) for p in params]
        columns = self._upload(np.array([[p.temperature for p in params], min_p, top_p], np.float32))
        temperatures = columns[0].unsqueeze(1)
        is_finite = (largest / temperatures).isfinite()
        scaled = torch.where(is_finite, logits / temperatures, 0.0)
        if any(p.min_p > 0 for p in params):
            scaled.masked_fill_(scaled < scaled.amax(-1, keepdim=True) + columns[1].unsqueeze(1), float("-inf"))
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        if min(top_k) < vocab_size:
            scaled = self._kernels.keep_top_k(scaled, self._upload(np.array(top_k, np.int32)))
        probs = torch.softmax(scaled, -1)
        if min(top_p) < 1:
            # The kernel takes limits below 1; where all is kept, its result is not used.
            kept = self._kernels.keep_top_p(probs, columns[2].clamp(max=1 - _MIN_TOP_P))
            probs = torch.where(columns[2].unsqueeze(1) < 1, kept, probs)
        return invert(probs, self._upload(_uniforms(rows, most))), is_finite


def invert(probs: Tensor, draws: Tensor) -> Tensor:
    """Return the first token whose cumulative weight exceeds u * total: never one of weight zero.

    probs [rows, vocab], draws [rows, n] float64 -> [rows, n] int64. Sums of chunks are searched, then one chunk.
    """
    chunks = F.pad(probs, (0, -probs.shape[1] % _CHUNK)).view(len(probs), -1, _CHUNK)  # [rows, chunks, _CHUNK]
    sums = chunks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    total = ends[:, -1:]
    points = (draws * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    chunk = torch.searchsorted(ends, points, right=True)
    start = ends.gather(1, chunk) - sums.gather(1, chunk)
    weights = chunks.gather(1, chunk.unsqueeze(-1).expand(-1, -1, _CHUNK))  # [rows, n, _CHUNK]
    cumulative = weights.cumsum(-1, dtype=torch.float64).add_(start.unsqueeze(-1))
    offset = torch.searchsorted(cumulative, points.unsqueeze(-1), right=True).squeeze(-1)
    # The chunk's own sum and the sum of its tokens may differ in the last bit: stay with a token that has weight.
    last = (torch.arange(_CHUNK, device=probs.device) * (weights > 0)).amax(-1)
    return chunk * _CHUNK + offset.minimum(last)


def _uniforms(rows: Sequence[SampleRow], most: int) -> NDArray[np.float64]:
    draws = np.zeros((len(rows), most))
    for index, row in enumerate(rows):
        draws[index, : len(row.choices)] = row.uniforms
    return draws
