"""A draft model beside its target: it says what may come next, and keeps its own keys and values in the same blocks.

    propose   before the target's step: one small forward for each drafted token, of all rows at once
    keep_up   behind the target's layers: what they were fed otherwise, prompts above all

Which positions it computes in a step is told by each row (`BatchRow.draft_span`). Its tokens are its best ones; they
decide nothing, for each is compared with what the target draws. It runs where its target runs, by the same runner,
and ranks share it as they share the target. Rank 0 says what is fed, and looks at the logits.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from ..common.batch import UNDRAFTED, Batch, BatchRow
from ..common.config import CoreSlot, EngineConfig
from ..common.errors import ConfigError
from ..common.request import BlockId
from ..kvcache.draft_pages import draft_pages
from ..models.config import ModelConfig
from ..models.digest import ModelDigest
from ..models.draft import check_draft
from .choose import choose_runner, pack_weights
from .nn.decoder import Decoder
from .nn.loading import Progress, load_weights
from .nn.plan import StepPlan
from .nn.runner import Runner
from .ranks.communicator import Communicator

if TYPE_CHECKING:
    from .cuda.drafting import GraphDrafts
    from .cuda.runner import CudaRunner


class _Stretch(NamedTuple):
    """Tokens of one sequence that are fed from a position on."""

    token_ids: Sequence[int]
    start: int
    block_table: list[BlockId]


class DraftModel:
    """Used by the engine's thread alone, under inference mode."""

    def __init__(
        self,
        config: EngineConfig,
        target: ModelConfig,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        native: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Load it; `attach` gives it pages. Raises ConfigError where it does not go with its target."""
        assert config.speculative_config is not None and config.speculative_config.model is not None
        path = config.speculative_config.model
        self._config, self._target = config.model_copy(update={"model_dir": path}), target
        self.model = replace(
            check_draft(config.model_dir, path, target.max_model_len, comm.size), max_model_len=target.max_model_len
        )
        self.pages = draft_pages(target, self.model, config.kv_cache_dtype, comm.size)
        self._digest = ModelDigest(path, config.load_format, config.seed)
        with torch.inference_mode():
            decoder = self._decoder = Decoder(self.model, comm, dtype=dtype, device=device)
            load_weights(decoder, path, load_format=config.load_format, seed=config.seed, progress=progress)
        self._native_model = pack_weights(decoder, device, native=native, isa=config.cpu_isa)
        self._num_choices = min(target.vocab_size, self.model.vocab_size)  # either may be padded
        self.runner: Runner
        self._graphs: GraphDrafts | None = None  # on one GPU

    @property
    def digest(self) -> str:
        """Wait for the digest of its weights, and of how they lie in blocks. Raises ConfigError."""
        return f"{self._digest.result()} {self.pages.name}"

    def attach(self, pages: Tensor, cores: CoreSlot | None) -> None:
        """Let it compute into its part of the engine's pages. Raises ConfigError."""
        layers = self.pages.layers(pages)
        try:
            self.runner = choose_runner(
                self._config, self._decoder, self._native_model, layers, whole=pages, cores=cores
            )
        except ConfigError as error:
            raise ConfigError(f"speculative_config: the draft model: {error}") from error
        if pages.device.type == "cuda":
            self._graphs = cast("CudaRunner", self.runner).drafts(self._num_choices)

    # --- steps ----------------------------------------------------------------------------------------------------

    def propose(self, batch: Batch, send: Callable[[StepPlan], None]) -> float:
        """Say the drafts that rows leave open; return the seconds that took. `send`: to the other ranks, if any."""
        rows = [row for row in batch.rows if row.draft and row.draft[0] == UNDRAFTED]
        if not rows:
            return 0.0
        began = time.perf_counter()
        drafts = self._graphs.propose(rows) if self._graphs is not None else None
        for row, draft in zip(rows, self._one_by_one(rows, send) if drafts is None else drafts, strict=True):
            row.draft = tuple(draft)
        return time.perf_counter() - began

    def _one_by_one(self, rows: Sequence[BatchRow], send: Callable[[StepPlan], None]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        for depth in range(max(len(row.draft) for row in rows)):
            going_on = [pair for pair in zip(rows, drafts, strict=True) if depth < len(pair[0].draft)]
            plan = self._plan([_next_stretch(row, draft) for row, draft in going_on], samples=True)
            send(plan)
            [logits] = self.runner.forward(plan, None)
            best: list[int] = logits[:, : self._num_choices].argmax(-1).tolist()
            for (_, draft), token in zip(going_on, best, strict=True):
                draft.append(token)
        return drafts

    def rest(self, batch: Batch) -> StepPlan | None:
        """Return what is left of the rows' spans, once all drafts are said; None: nothing."""
        stretches = [stretch for row in batch.rows if (stretch := _rest(row)) is not None]
        return self._plan(stretches, samples=False) if stretches else None

    def keep_up(self, rest: StepPlan | None) -> float:
        """Compute it, or queue it on a GPU; return the seconds that took."""
        began = time.perf_counter()
        if rest is not None:
            self.follow(rest)
        return time.perf_counter() - began

    def follow(self, plan: StepPlan) -> None:
        """Compute what another rank says, or that nobody draws from."""
        for _ in self.runner.forward(plan, None):
            pass

    def _plan(self, stretches: Sequence[_Stretch], *, samples: bool) -> StepPlan:
        input_ids, starts, lengths, block_ids, ends = (array("i") for _ in range(5))
        size = self._config.block_tokens
        for token_ids, start, block_table in stretches:
            input_ids.extend(token_ids)
            starts.append(start)
            lengths.append(len(token_ids))
            block_ids.extend(block_table[: -(-(start + len(token_ids)) // size)])
            ends.append(len(input_ids) - 1)
        if self._num_choices < self._target.vocab_size:  # what the target's padding says is no token here
            input_ids = array("i", [token if token < self._num_choices else 0 for token in input_ids])
        return StepPlan(
            input_ids=input_ids.tobytes(),
            starts=starts.tobytes(),
            lengths=lengths.tobytes(),
            block_ids=block_ids.tobytes(),
            sample_rows=ends.tobytes() if samples else b"",
            prompt_rows=b"",
            block_copies=(),
            is_draft=True,
        )


def _next_stretch(row: BatchRow, draft: list[int]) -> _Stretch:
    """Return what is fed for the token after `draft`: at first all that is not computed of what is known."""
    if draft:
        return _Stretch(draft[-1:], row.start + len(draft), row.seq.block_table)
    first, known = row.draft_model_span[0], row.start + row.num_known_tokens
    return _Stretch(row.seq.token_ids[first:known], first, row.seq.block_table)


def _rest(row: BatchRow) -> _Stretch | None:
    """Return what of the row's span `propose` has not fed; None: nothing."""
    rest = row.draft_model_rest
    if not rest:
        return None
    known = row.start + row.num_known_tokens
    drafted = row.draft[max(0, rest.start - known) : rest.stop - known]
    return _Stretch([*row.seq.token_ids[rest.start : known], *drafted], rest.start, row.seq.block_table)
