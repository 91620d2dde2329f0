"""A batch as plain arrays, the same on every rank, and as the tensors that torch and its kernels take.

Rows stand packed in a line, one after another; a packed token is an index into that line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from ...common.adapter import NO_ADAPTER
from ...common.batch import Batch, BatchRow
from .attention.base import AttentionMetadata

_LOGIT_ROWS = 64  # logits made at once: 64 x 128,256 in float32 is 33 MB


class StepPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A batch as arrays. Bytes hold int32 in this machine's order."""

    input_ids: bytes  # [num_tokens]
    starts: bytes  # [rows] tokens whose KV exists
    lengths: bytes  # [rows] tokens fed
    block_ids: bytes  # [num_pages] of each row as many as its tokens need, row after row
    sample_rows: bytes  # packed tokens whose logits choose the next token
    prompt_rows: bytes  # packed tokens whose logits tell the next prompt token's log-probability
    block_copies: tuple[tuple[int, int], ...]
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    pooled_rows: bytes = b""  # packed tokens whose hidden states behind the final norm are wanted
    adapters: bytes = b""  # [rows] the slot of each row's adapter; empty: no row has one
    drafted: bytes = b""  # [rows] the last of the tokens fed that are a draft, in no state behind the step; empty: none
    is_measured: bool = False  # behind tokens that no step has computed
    # Of several ranks with a draft model, which says what is fed when blocks have been copied:
    is_begin: bool = False  # copies alone; drafted tokens, and then the step, follow
    is_draft: bool = False  # of the draft model
    behind: StepPlan | None = None  # what the draft model is fed behind the step


def plan_step(batch: Batch, block_size: int) -> StepPlan:
    input_ids, starts, lengths, block_ids, sample_rows, prompt_rows, pooled_rows = (array("i") for _ in range(7))
    for row in batch.rows:
        token = len(input_ids)
        prompt_rows.extend(range(token, token + _num_prompt_logprobs(row)))
        pooled_rows.extend(token + offset for offset in row.pooled_tokens)
        input_ids.extend(row.token_ids)
        starts.append(row.start)
        lengths.append(row.num_scheduled_tokens)
        block_ids.extend(row.seq.block_table[: -(-row.end // block_size)])
        if row.samples:
            sample_rows.extend(range(len(input_ids) - 1 - len(row.draft), len(input_ids)))
    return StepPlan(
        input_ids=input_ids.tobytes(),
        starts=starts.tobytes(),
        lengths=lengths.tobytes(),
        block_ids=block_ids.tobytes(),
        sample_rows=sample_rows.tobytes(),
        prompt_rows=prompt_rows.tobytes(),
        block_copies=tuple(batch.block_copies),
        swap_out=tuple(batch.swap_out),
        swap_in=tuple(batch.swap_in),
        pooled_rows=pooled_rows.tobytes(),
        adapters=_slots(batch),
        drafted=array("i", (len(row.draft) for row in batch.rows)).tobytes() if batch.has_drafts else b"",
    )


def _slots(batch: Batch) -> bytes:
    slots = array("i", (row.seq.adapter_slot for row in batch.rows))
    return b"" if all(slot == NO_ADAPTER for slot in slots) else slots.tobytes()


def token_adapters(plan: StepPlan) -> Tensor | None:
    """Return the slot of each packed token's adapter, [num_tokens]; None: no row has one."""
    if not plan.adapters:
        return None
    return torch.repeat_interleave(_int32(plan.adapters), _int32(plan.lengths))


def step_rows(plan: StepPlan, block_size: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield of each row the tokens that are computed, those that are fed, and its blocks as far as these need them."""
    starts, lengths, block_ids = (_int32(part).tolist() for part in (plan.starts, plan.lengths, plan.block_ids))
    page = 0
    for start, length in zip(starts, lengths, strict=True):
        end = page - (-(start + length) // block_size)
        yield start, length, block_ids[page:end]
        page = end


def logit_rows(plan: StepPlan) -> list[Tensor]:
    """List the packed tokens whose logits are needed: the sample rows, if any, then the prompt rows in parts."""
    prompt_rows = _int32(plan.prompt_rows)
    parts = [prompt_rows[i : i + _LOGIT_ROWS] for i in range(0, len(prompt_rows), _LOGIT_ROWS)]
    return [part for part in (_int32(plan.sample_rows), *parts) if len(part)]


def pooled_rows(plan: StepPlan) -> Tensor:
    """Return the packed tokens whose hidden states are wanted, [n] int32."""
    return _int32(plan.pooled_rows)


def prompt_targets(batch: Batch) -> Iterator[list[tuple[int, int]]]:
    """Yield for each row, for each of its tokens in `prompt_rows`, the prompt token that follows it, and how many
    best ones its request wants to be told.
    """
    for row in batch.rows:
        num_best = row.seq.sampling.prompt_logprobs or 0
        targets = range(row.start + 1, row.start + 1 + _num_prompt_logprobs(row))
        yield [(row.seq.token_ids[position], num_best) for position in targets]


def _num_prompt_logprobs(row: BatchRow) -> int:
    """Count the fed prompt tokens that a prompt token follows, where log-probabilities of the prompt are asked for."""
    if row.seq.sampling.prompt_logprobs is None:
        return 0
    return max(0, min(row.end, row.seq.num_prompt_tokens - 1) - row.start)


def _int32(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)


def step_tensors(plan: StepPlan, block_size: int) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """Return input_ids [num_tokens] int32, positions [num_tokens] int64 and attention's metadata, all on the host."""
    input_ids, starts, lengths, block_ids = map(_int32, (plan.input_ids, plan.starts, plan.lengths, plan.block_ids))
    ends = starts + lengths
    qo_indptr, kv_indptr = _indptr(lengths), _indptr((ends + block_size - 1) // block_size)
    assert kv_indptr[-1] == len(block_ids), "a block table is shorter than its sequence"
    row_of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.arange(len(input_ids)) - (qo_indptr[:-1] - starts)[row_of_token]
    blocks = block_ids[kv_indptr[:-1][row_of_token] + positions // block_size].long()
    metadata = AttentionMetadata(
        num_decode_rows=int((lengths == 1).long().cumprod(0).sum()),
        qo_indptr=qo_indptr,
        paged_kv_indptr=kv_indptr,
        paged_kv_indices=block_ids,
        paged_kv_last_page_len=(ends - 1) % block_size + 1,
        kv_lens=tuple(ends.tolist()),
        slot_mapping=blocks * block_size + positions % block_size,
    )
    return input_ids, positions, metadata


def _indptr(counts: Tensor) -> Tensor:
    """[rows] -> [rows + 1] int32: where each row's part starts, and the end."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))
