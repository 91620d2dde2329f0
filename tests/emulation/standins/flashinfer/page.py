from __future__ import annotations

import torch
from torch import Tensor

from kvferry.tests.emulation.stream import launch

from .checks import check, rows, whole


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """`append_key` and `append_value` [tokens, heads, head_dim] go to their rows' pages."""
    check(kv_layout == "HND" and isinstance(paged_kv_cache, Tensor), "only one tensor of HND pages is used")
    assert isinstance(paged_kv_cache, Tensor)
    pages = rows("pages", paged_kv_cache)  # [pages, 2, heads, page_size, head_dim]
    keys, values = (rows(name, each, pages.dtype) for name, each in (("k", append_key), ("v", append_value)))
    row, place, ids, indptr, last = (
        whole(name, each, torch.int32)
        for name, each in (
            ("batch_indices", batch_indices),
            ("positions", positions),
            ("kv_indices", kv_indices),
            ("kv_indptr", kv_indptr),
            ("kv_last_page_len", kv_last_page_len),
        )
    )
    check(len(row) == len(place) == len(keys) == len(values), "a row and a position for each token")
    check(keys.shape[1:] == values.shape[1:] == (pages.shape[2], pages.shape[4]), "heads of the pages")
    check(len(indptr) == len(last) + 1, "indptr and last_page_len are of different rows")
    page_size = pages.shape[3]
    plain = torch.uint8 if pages.dtype.itemsize == 1 else pages.dtype  # torch indexes no 8-bit floats

    def kernel() -> None:
        blocks = ids[(indptr[row.long()] + place // page_size).long()].long()
        for part, source in enumerate((keys, values)):
            pages.view(plain)[blocks, part, :, (place % page_size).long()] = source.contiguous().view(plain)

    launch(kernel)


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor | None,
    kpe_cache: Tensor | None,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """`append_ckv` [tokens, 512] and `append_kpe` [tokens, 64] go to their rows' pages, [pages, page_size, same]."""
    assert ckv_cache is not None and kpe_cache is not None
    latents, turned = (rows(name, each) for name, each in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)))
    sources = [rows("append_ckv", append_ckv, latents.dtype), rows("append_kpe", append_kpe, latents.dtype)]
    row, place, ids, indptr, last = (
        whole("an index", each, torch.int32)
        for each in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    )
    check(
        latents.dim() == turned.dim() == 3 and (latents.shape[2], turned.shape[2]) == (512, 64), "latents of 512 + 64"
    )
    check([each.shape[1:] for each in sources] == [(512,), (64,)], "tokens of 512 + 64")
    check(turned.dtype == latents.dtype and latents.shape[:2] == turned.shape[:2], "pages of both parts")
    check(len(row) == len(place) == len(sources[0]) == len(sources[1]) > 0, "a row and a position for each token")
    check(len(indptr) == len(last) + 1, "indptr and last_page_len are of different rows")
    page_size = latents.shape[1]

    def kernel() -> None:
        blocks = ids[(indptr[row.long()] + place // page_size).long()].long()
        for pages, source in zip((latents, turned), sources, strict=True):
            pages[blocks, (place % page_size).long()] = source

    launch(kernel)
