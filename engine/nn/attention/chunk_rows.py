"""A step as layers see it that attend in chunks: a row's tokens of a chunk are a row, which begins with the chunk.

    chunks of 4            row of tokens 0 to 9, of which 6 to 9 are fed      rows of 2 and 2 tokens, of 4 and 2 keys

All that such a row's tokens see is in it, up to themselves. A chunk is whole blocks, so a row's pages are some of the
row's that it was cut from.
"""

from __future__ import annotations

import torch

from .base import AttentionMetadata


def by_chunk(metadata: AttentionMetadata, chunk: int, block_size: int) -> AttentionMetadata:
    """Cut a step's rows at the ends of chunks. Rows of one token stay the leading ones."""
    assert chunk % block_size == 0, (chunk, block_size)
    qo_indptr, kv_indptr, kv_lens = [0], [0], list[int]()
    tables, ends = list[torch.Tensor](), list[int]()
    fed, pages = metadata.qo_indptr.tolist(), metadata.paged_kv_indptr.tolist()
    for row, kv_len in enumerate(metadata.kv_lens):
        start = kv_len - (fed[row + 1] - fed[row])
        for first in range(start // chunk * chunk, kv_len, chunk):
            end = min(kv_len, first + chunk)
            table = slice(pages[row] + first // block_size, pages[row] - (-end // block_size))
            tables.append(metadata.paged_kv_indices[table])
            qo_indptr.append(qo_indptr[-1] + end - max(start, first))
            kv_indptr.append(kv_indptr[-1] + len(tables[-1]))
            kv_lens.append(end - first)
            ends.append(end)
    return AttentionMetadata(
        num_decode_rows=metadata.num_decode_rows,
        qo_indptr=torch.tensor(qo_indptr, dtype=torch.int32),
        paged_kv_indptr=torch.tensor(kv_indptr, dtype=torch.int32),
        paged_kv_indices=torch.cat(tables),
        paged_kv_last_page_len=torch.tensor([(end - 1) % block_size + 1 for end in ends], dtype=torch.int32),
        kv_lens=tuple(kv_lens),
        slot_mapping=metadata.slot_mapping,
    )
