"""Attention on the CPU with torch alone, over the same pages as every backend.

Decode rows are gathered in groups of similar length, padded to the longest, and attended with two batched matrix
products; the query heads that share a KV head are the rows of one product, so K and V are never repeated. Prefill
rows go one by one in tiles of queries, so that scores stay within a few MiB however long the context is, and keys
that a whole tile cannot see are not touched. Two products and a softmax beat scaled_dot_product_attention here by
1.6 to 2.3 times in bfloat16 and are level with it in float32 (9 query and 3 KV heads of 64, one thread).

Whole pages are gathered, and behind a sequence's last token lies what an earlier owner left. A weight of zero does not
silence NaN: such values are cleared, and such scores replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ....models.parts.chunks import Chunk, first_seen
from .base import PLAIN_SCORES, AttentionMetadata, LayerPages, Scores
from .int8_rows import widened
from .paged_heads import PagedHeads
from .paged_plan import DecodeGroup, Planner, PrefillRow, WindowPlan

_CACHE_BYTES = 8 << 20  # what a product's operands should stay within; measured
_MIN_TILE = 8  # queries: a product of fewer reads its keys too often for what it calculates
_NO = float("-inf")


class CPUAttention(PagedHeads):
    """Implements `AttentionBackend`: scratch memory is reused from call to call."""

    def __init__(
        self,
        pages: LayerPages,
        num_qo_heads: int,
        sliding_windows: Sequence[int | None],
        scores: Scores = PLAIN_SCORES,
        *,
        dtype: torch.dtype | None = None,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        """`dtype`: what is computed in, where pages are in another. On a processor that has no bfloat16 float32 is
        faster, keys and values being widened where they are gathered anyway: on a Zen 3, 9 query and 3 KV heads of 64,
        a chunk of 512 tokens in 8 ms in place of 131, eight lone tokens behind 1,024 in 5.4 in place of 8.6.
        """
        super().__init__(pages, num_qo_heads, sliding_windows, scores, dtype)
        self._num_qo_heads = num_qo_heads
        self._score_bytes = cache_bytes  # scores of one prefill tile over several heads
        self._max_score_bytes = 4 * cache_bytes  # scores of one prefill tile of one KV head
        self._planner = Planner(
            num_kv_heads=self._num_kv_heads,
            block_size=self._block_size,
            steps=self._steps,
            key_bytes=self._num_kv_heads * self._head_dim * self._dtype.itemsize,
            group_bytes=cache_bytes // 2,
        )
        self._tile = 128 if self._dtype == torch.bfloat16 else 64  # queries; measured
        self._causal = torch.full((self._tile, self._tile), _NO, dtype=self._dtype).triu_(1)
        self._scratch: dict[str, Tensor] = {}
        self._plans: dict[int | None, WindowPlan] = {}

    def plan(self, metadata: AttentionMetadata) -> None:
        super().plan(metadata)
        self._plans = {window: self._planner.plan(metadata, window) for window in set(self._windows)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        self._write(k, v, layer_id)
        plan = self._plans[self._windows[layer_id]]
        scaled = (q * self._scale).to(self._dtype)  # contiguous, unlike q
        out = self._take("out", q.shape[0], self._num_qo_heads, self._value_dim)
        out[len(self._blocks) :].zero_()  # padding
        page_rows = self._page_rows[layer_id]
        for group in plan.groups:
            self._decode(group, scaled, page_rows, layer_id, out)
        for row in plan.prefill:
            self._prefill(row, plan.window, scaled, page_rows, layer_id, out)
        return out.to(q.dtype)

    def _decode(self, group: DecodeGroup, q: Tensor, page_rows: Tensor, layer_id: int, out: Tensor) -> None:
        n, keys = group.num_rows, group.num_keys
        k = self._gather("k", page_rows, group.k_index).view(n * self._num_kv_heads, keys, self._head_dim)
        v = self._gather("v", page_rows, group.v_index).view(k.shape) if self._has_values else k
        rows = q[:n] if group.rows is None else q[group.rows]
        scores = torch.bmm(rows.view(n * self._num_kv_heads, self._group_size, self._head_dim), k.transpose(1, 2))
        self._bound(scores).view(n, self._num_kv_heads, self._group_size, keys).masked_fill_(group.hidden, _NO)
        v.view(-1, self._head_dim).index_fill_(0, group.hidden_values, 0.0)
        weights = self._softmax(scores, layer_id, slice(None))
        attended = torch.bmm(weights, v[..., : self._value_dim]).view(n, self._num_qo_heads, self._value_dim)
        if group.rows is None:
            out[:n] = attended
        else:
            out[group.rows] = attended

    def _prefill(
        self, row: PrefillRow, window: int | None, q: Tensor, page_rows: Tensor, layer_id: int, out: Tensor
    ) -> None:
        shape = (row.num_tokens, self._num_kv_heads, self._group_size, -1)
        chunk = slice(row.token, row.token + row.num_tokens)
        queries = q[chunk].view(shape).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, head_dim]
        results = out[chunk].view(shape).permute(1, 2, 0, 3)
        tile, step = self._tiling(row.num_keys)
        for head in range(0, self._num_kv_heads, step):
            heads = slice(head, min(head + step, self._num_kv_heads))
            num_heads = heads.stop - heads.start
            k = self._gather("k", page_rows, row.k_index[heads].reshape(-1)).view(num_heads, -1, self._head_dim)
            v = k[..., : self._value_dim]
            if self._has_values:
                v = self._gather("v", page_rows, row.v_index[heads].reshape(-1)).view(num_heads, -1, self._head_dim)
            for start in range(0, row.num_tokens, tile):
                stop = min(start + tile, row.num_tokens)
                scores, values = self._score_tile(row, window, queries[heads, :, start:stop], k, v, start)
                probabilities = self._softmax(scores, layer_id, heads, self._take("probabilities", *scores.shape))
                attended = torch.bmm(probabilities, values)
                results[heads, :, start:stop] = attended.view(num_heads, self._group_size, -1, self._value_dim)

    def _tiling(self, num_keys: int) -> tuple[int, int]:
        """Return how many queries and KV heads a tile has, so that scores stay small."""
        key_bytes = self._group_size * num_keys * self._dtype.itemsize
        tile = self._tile
        while tile > _MIN_TILE and tile * key_bytes > self._max_score_bytes:
            tile //= 2
        return tile, max(1, min(self._num_kv_heads, self._score_bytes // (tile * key_bytes)))

    def _score_tile(
        self, row: PrefillRow, window: int | None, queries: Tensor, k: Tensor, v: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Score queries [heads, group, n, head_dim], `start` tokens into the row, with the keys that any of them sees.

        Returns [heads, group * n, keys] and these keys' values.
        """
        heads, group, n, head_dim = queries.shape
        position = row.kv_len - row.num_tokens + start  # of the tile's first query
        stop = position + n - row.first_key
        first = max(0, first_seen(position, window) - row.first_key)
        shape = (heads, group * n, stop - first)
        scores = self._take("scores", *shape)
        torch.bmm(queries.reshape(heads, group * n, head_dim), k[:, first:stop].transpose(1, 2), out=scores)
        by_query = self._bound(scores).view(heads, group, n, stop - first)
        by_query[..., -n:].add_(self._causal[:n, :n])
        if isinstance(window, Chunk):
            begins = torch.tensor([[window.first(position + i)] for i in range(n)]) - row.first_key - first
            by_query.masked_fill_(torch.arange(stop - first) < begins, _NO)
        elif window is not None:
            # query i sees key `first + c` iff c > i + last_hidden
            last_hidden = position - window - row.first_key - first
            edge = min(n + last_hidden, stop - first)
            if edge > 0:
                hidden = torch.arange(edge) <= torch.arange(n).unsqueeze(1) + last_hidden
                by_query[..., :edge].masked_fill_(hidden, _NO)
        return scores, v[:, first:stop]

    def _bound(self, scores: Tensor) -> Tensor:
        """Keep scores below the cap, in place."""
        cap = self._scores.cap
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)

    def _softmax(self, scores: Tensor, layer_id: int, heads: slice, out: Tensor | None = None) -> Tensor:
        """Weigh keys by their scores, [n * KV heads, rows, keys], rows being a group's query heads, each n in turn."""
        if self._scores.sinks is None:
            return torch.softmax(scores, -1, out=out)
        sinks = self._scores.sinks[layer_id].view(self._num_kv_heads, self._group_size, 1)[heads].to(scores.dtype)
        sinks = sinks.repeat(len(scores) // len(sinks), 1, 1)
        sinks = sinks.repeat_interleave(scores.shape[1] // self._group_size, 1)
        return torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]

    def _gather(self, name: str, page_rows: Tensor, index: Tensor) -> Tensor:
        if page_rows.dtype != self._dtype:
            return widened(page_rows[index], self._block_size, self._dtype)
        out = self._take(name, index.shape[0], page_rows.shape[1])
        return torch.index_select(page_rows, 0, index, out=out)

    def _take(self, name: str, *shape: int) -> Tensor:
        """Return scratch memory under a name, grown when needed; its content is anything."""
        numel = math.prod(shape)
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < numel:
            # By powers of two: else a long prompt leaves a hole in the heap at each chunk. Unused pages cost nothing.
            buffer = self._scratch[name] = torch.empty(1 << (numel - 1).bit_length(), dtype=self._dtype)
        return buffer[:numel].view(shape)
