"""Attention on the CPU whose results do not depend on what is computed together, to the bit.

A token's queries stand in a tile of 8 tokens at the place that its position gives them, whatever else of the tile is
asked for; keys come in tiles of 256 that begin at multiples of 256. So every product has one shape, a token always the
same row of it, and the running softmax (Milakov & Gimelshein 2018) takes the same steps in the same order: in a
prompt or alone, in one chunk or in many. It calculates in float32, and costs more than `CPUAttention`: empty places of
tiles are multiplied like full ones. What an earlier owner left behind a row's last token counts as zero: NaN does not
vanish by a weight of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import PLAIN_SCORES, AttentionMetadata, LayerPages, Scores
from .int8_rows import widened
from .paged_heads import PagedHeads

_QUERIES = 8  # tokens of a tile
_KEYS = 256  # of a tile: a multiple of it, and of every block size
_LEAST = -1e30  # a score below all others that can be subtracted from itself


@dataclass(slots=True, frozen=True)
class _QueryTile:
    """Tokens [token, token + num_tokens) of the packed line, from the tile's place `slot` on."""

    token: int
    num_tokens: int
    slot: int
    position: int  # of the tile's first place

    def first_key(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.position + self.slot - window + 1)

    @property
    def last_key(self) -> int:
        return self.position + self.slot + self.num_tokens - 1


@dataclass(slots=True, frozen=True)
class _KeyTile:
    """Keys [position, position + _KEYS) of one row; past the row's last page, that page again."""

    position: int
    k_index: Tensor  # [num_kv_heads * pages] rows of the layer seen as [-1, block_size * head_dim]
    v_index: Tensor


@dataclass(slots=True, frozen=True)
class _Row:
    kv_len: int
    queries: list[_QueryTile]
    keys: list[_KeyTile]


@dataclass(slots=True)
class _Running:
    """A tile of queries, and what it has seen so far."""

    tile: _QueryTile
    queries: Tensor  # [num_kv_heads, rows, head_dim]
    largest: Tensor  # [num_kv_heads, rows, 1]
    total: Tensor
    sums: Tensor  # [num_kv_heads, rows, value_dim]


class TiledAttention(PagedHeads):
    """Implements `AttentionBackend` for a thread that calculates alone: torch cuts sums where its threads meet."""

    def __init__(
        self,
        pages: LayerPages,
        num_qo_heads: int,
        sliding_windows: Sequence[int | None],
        scores: Scores = PLAIN_SCORES,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: the model's, where pages are in another."""
        super().__init__(pages, num_qo_heads, sliding_windows, scores, dtype)
        self._rows: list[_Row] = []
        self._places = torch.arange(_QUERIES).unsqueeze(1)
        self._columns = torch.arange(_KEYS)

    # --- planning ------------------------------------------------------------------------------------------

    def plan(self, metadata: AttentionMetadata) -> None:
        super().plan(metadata)
        tokens, pages = metadata.qo_indptr.tolist(), metadata.paged_kv_indptr.tolist()
        self._rows = [
            _Row(
                metadata.kv_lens[row],
                list(_query_tiles(tokens[row], tokens[row + 1] - tokens[row], metadata.kv_lens[row])),
                list(self._key_tiles(metadata.paged_kv_indices[pages[row] : pages[row + 1]])),
            )
            for row in range(metadata.num_rows)
        ]

    def _key_tiles(self, blocks: Tensor) -> Iterator[_KeyTile]:
        count = _KEYS // self._block_size
        for first in range(0, len(blocks), count):
            columns = torch.arange(first, first + count).clamp_(max=len(blocks) - 1)
            k_index = self._steps.first_of_keys(blocks[columns], self._num_kv_heads).reshape(-1)
            yield _KeyTile(first * self._block_size, k_index, k_index + self._steps.part)

    # --- running -------------------------------------------------------------------------------------------

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        self._write(k, v, layer_id)
        out = torch.zeros(*q.shape[:2], self._value_dim, dtype=q.dtype)
        for row in self._rows:
            self._attend(row, q, layer_id, out)
        return out

    def _attend(self, row: _Row, q: Tensor, layer_id: int, out: Tensor) -> None:
        window = self._windows[layer_id]
        running = [self._start(tile, q, layer_id) for tile in row.queries]
        first = min(tile.first_key(window) for tile in row.queries)
        for keys in row.keys:
            if keys.position + _KEYS <= first:
                continue
            k = self._gather(layer_id, keys.k_index)
            v = self._gather(layer_id, keys.v_index) if self._has_values else k[..., : self._value_dim]
            v[:, row.kv_len - keys.position :] = 0.0
            for part in running:
                if keys.position <= part.tile.last_key:
                    self._see(part, k, v, self._hidden(part.tile, keys.position, window))
        for part in running:
            self._finish(part, out)

    def _start(self, tile: _QueryTile, q: Tensor, layer_id: int) -> _Running:
        heads, group, dim = self._num_kv_heads, self._group_size, self._head_dim
        queries = torch.zeros(heads, _QUERIES, group, dim)
        tokens = q[tile.token : tile.token + tile.num_tokens].view(tile.num_tokens, heads, group, dim)
        queries[:, tile.slot : tile.slot + tile.num_tokens] = tokens.transpose(0, 1)
        queries.mul_(self._scale)
        shape = (heads, _QUERIES * group)
        largest, total = torch.full((*shape, 1), _LEAST), torch.zeros(*shape, 1)
        if self._scores.sinks is not None:  # seen before all keys
            sinks = self._scores.sinks[layer_id].float().view(heads, 1, group)
            largest.view(heads, _QUERIES, group).copy_(sinks)
            total.fill_(1.0)
        return _Running(
            tile,
            queries.view(*shape, dim),
            largest,
            total,
            torch.zeros(*shape, self._value_dim),
        )

    def _gather(self, layer_id: int, index: Tensor) -> Tensor:
        rows = widened(self._page_rows[layer_id][index], self._block_size, self._dtype)
        return rows.view(self._num_kv_heads, _KEYS, self._head_dim).float()

    def _hidden(self, tile: _QueryTile, first_key: int, window: int | None) -> Tensor | None:
        """[places, keys]: what a place does not see; None: every place sees all."""
        if first_key + _KEYS <= tile.position + 1 and window is None:
            return None
        distance = self._places + (tile.position - first_key) - self._columns
        return distance < 0 if window is None else (distance < 0) | (distance >= window)

    def _see(self, part: _Running, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        scores = torch.bmm(part.queries, k.transpose(1, 2))
        if self._scores.cap is not None:
            scores.div_(self._scores.cap).tanh_().mul_(self._scores.cap)
        if hidden is not None:
            by_place = scores.view(self._num_kv_heads, _QUERIES, self._group_size, _KEYS)
            by_place.masked_fill_(hidden.unsqueeze(1), float("-inf"))
        largest = torch.maximum(part.largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        factor = part.largest.sub_(largest).exp_()
        part.total.mul_(factor).add_(weights.sum(-1, keepdim=True))
        part.sums.mul_(factor).add_(torch.bmm(weights, v))
        part.largest = largest

    def _finish(self, part: _Running, out: Tensor) -> None:
        tile, heads, group, dim = part.tile, self._num_kv_heads, self._group_size, self._value_dim
        result = part.sums.div_(part.total).view(heads, _QUERIES, group, dim).transpose(0, 1)
        tokens = out[tile.token : tile.token + tile.num_tokens].view(tile.num_tokens, heads, group, dim)
        tokens.copy_(result[tile.slot : tile.slot + tile.num_tokens])


def _query_tiles(token: int, num_tokens: int, kv_len: int) -> Iterator[_QueryTile]:
    """Yield the tiles of a row that feeds `num_tokens` tokens from the packed `token` on, the last ones of `kv_len`."""
    position, end = kv_len - num_tokens, kv_len
    while position < end:
        slot = position % _QUERIES
        count = min(_QUERIES - slot, end - position)
        yield _QueryTile(token, count, slot, position - slot)
        token, position = token + count, position + count
