"""Pages as NIXL's prepared descriptors know them: rows that name every piece of every page, and indices of those."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .base import Piece


def strided_rows(
    pieces: tuple[Piece, ...], offsets: list[int], base_addr: int, page_bytes: int, device_id: int, num_pages: int
) -> npt.NDArray[np.uint64]:
    """One row per piece: (address, bytes, device, stride, count); piece k of page p has index k * num_pages + p."""
    rows = [
        (base_addr + offset, piece.num_bytes, device_id, page_bytes, num_pages)
        for piece, offset in zip(pieces, offsets, strict=True)
    ]
    return np.array(rows, dtype=np.uint64)


def piece_indices(pages: Sequence[int], num_pieces: int, num_pages: int) -> npt.NDArray[np.int32]:
    """Indices of all pieces of `pages` in the prepared descriptors."""
    index = np.asarray(pages, dtype=np.int32)
    if num_pieces == 1:
        return index
    return (np.arange(num_pieces, dtype=np.int32)[:, None] * num_pages + index).ravel()
