"""The model of a simulated worker's steps: each checks every page that it reads, and writes its own (`memory.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvferry.common.batch import UNDRAFTED, Batch, BatchRow, RowOutput, StepOutput, verified_output
from kvferry.common.request import SampledToken, Sequence
from kvferry.engine.masks import find_mask, with_forced
from kvferry.kvcache.blocks import BlockPool

from .adapters import SimLoader
from .breach import Breach
from .drafting import Drafts
from .grammars import mask_of
from .memory import Memory
from .oracle import VOCAB_SIZE, Answer, Oracle, sampled, state_of


class _Work(NamedTuple):
    """A row as it was when its step began."""

    seq: Sequence
    answer: Answer
    table: list[int]
    start: int
    end: int
    choices: tuple[int, ...]  # to sample; empty: the row does not
    tags: list[int]  # of the fed positions
    scores: bool  # log-probabilities of its prompt tokens are asked for
    draft_start: int  # where the draft model begins to compute
    draft_tags: list[int]  # of what it computes


class Engine:
    """Runs batches on one worker's memory. The caller lets the time pass between `begin`, layers and `end`."""

    def __init__(
        self,
        name: str,
        memory: Memory,
        pool: BlockPool,
        oracles: dict[str, Oracle],
        num_own_layers: int,
        adapters: SimLoader,
        postponed: Callable[[], bool],
    ) -> None:
        """`num_own_layers`: those behind them are a draft model's. `postponed()`: is a mask late this time?"""
        self._name = name
        self._num_own_layers = num_own_layers
        self._memory = memory
        self._pool = pool
        self._oracles = oracles
        self._adapters = adapters
        self._postponed = postponed
        self._keeps_states = memory.states_from < memory.num_layers
        self._work: list[_Work] = []
        self._copied: set[int] = set()
        self.num_steps = 0

    def begin(self, batch: Batch) -> None:
        """Take over the batch; copy blocks out, in, and between, and see what states the rows go on from."""
        for block, slot in batch.swap_out:
            self._memory.swap_out(block, slot)
        for slot, block in batch.swap_in:
            self._memory.swap_in(slot, block)
        for source, target in batch.block_copies:
            self._memory.copy_block(source, target)
        self._copied = {source for source, _ in (*batch.block_copies, *batch.swap_out)}  # read before they are written
        self._work = [self._work_of(row) for row in batch.rows]
        for work in self._work:
            self._check_states(work)
        self._check_masks([row for row in batch.rows if row.samples])

    def _work_of(self, row: BatchRow) -> _Work:
        seq = row.seq
        self._adapters.check(seq)
        answer = self._oracles[seq.request_id].answers[seq.choice]
        start, end = row.start, row.start + row.num_known_tokens
        if row.draft and row.draft[0] == UNDRAFTED:
            row.draft = Drafts(answer).propose(seq.token_ids, len(row.draft))
        if seq.token_ids[:end] != answer.tokens[:end]:
            raise Breach("I6", f"{self._name} is fed {seq.token_ids[:end]} for {seq.request_id}/{seq.choice}")
        tags = answer.tags[start:end]
        for token in row.draft:
            tags.append(hash((tags[-1], token)))
        scores = seq.sampling.prompt_logprobs is not None
        first, last = row.draft_span or (start, row.end)
        draft_tags = [*answer.tags[first:start], *tags[max(0, first - start) :]][: last - first]
        choices = row.choices if row.samples else ()
        return _Work(seq, answer, list(seq.block_table), start, end, choices, tags, scores, first, draft_tags)

    def _check_states(self, work: _Work) -> None:
        """A row's state is that behind the token before its first one, whatever else its blocks hold."""
        memory, before = self._memory, work.start - 1
        if before < 0:
            return
        for layer in range(memory.states_from, memory.num_layers):
            page = memory.pages[memory.page(layer, work.table[before // memory.block_size])]
            if page[0] != work.answer.tags[before]:
                text = f"{self._name} goes on with {work.seq.request_id} from a state {page[0]}"
                raise Breach("H2", f"{text}, which is not behind its {work.start} tokens")

    def _check_masks(self, rows: list[BatchRow]) -> None:
        """What may come next is what the answer's own grammar says at this place."""
        for row in rows:
            mask = None if row.seq.grammar is None else find_mask(row)
            answer = self._oracles[row.seq.request_id].answers[row.choices[0]]
            index = row.seq.num_output_tokens
            wanted = answer.allowed[index] if index < len(answer.allowed) else None
            if (mask is None) != (wanted is None) or (mask and (mask.failure or mask.words != mask_of(wanted or ()))):
                name = f"{row.seq.request_id}/{row.choices[0]}"
                raise Breach("G1", f"{self._name} lets {mask} come at index {index} of {name}, not {wanted}")
            for place, words in enumerate(() if mask is None else mask.behind_draft, 1):
                right = answer.output[index : index + place]
                is_right = index + place < len(answer.allowed) and list(row.draft[:place]) == right
                if is_right and words != mask_of(answer.allowed[index + place]):
                    raise Breach("G1", f"{self._name}: a wrong mask behind {place} drafted tokens")

    def write_layer(self, layer: int) -> None:
        """The layer's keys and values of this step."""
        memory = self._memory
        size = memory.block_size
        for work in self._work:
            start, tags = (
                (work.start, work.tags) if layer < self._num_own_layers else (work.draft_start, work.draft_tags)
            )
            if layer >= memory.states_from:  # of a draft nothing is in a state
                start, tags = work.start, work.tags[: work.end - work.start]
            position, end = start, start + len(tags)
            while position < end:
                block = work.table[position // size]
                slot = position % size
                count = min(size - slot, end - position)
                self._check_owned(block, work)
                first = position - start
                if layer < memory.states_from:
                    memory.write(layer, block, slot, tags[first : first + count])
                else:
                    memory.write(layer, block, 0, [tags[first + count - 1]] * size)
                position += count

    def _check_owned(self, block: int, work: _Work) -> None:
        refs = self._pool.ref_count(block)
        if refs != 1 and not (refs > 1 and block in self._copied):
            text = f"{self._name} writes {work.seq.request_id} to block {block} with {refs} holders"
            raise Breach("I3" if refs else "I2", text)

    def end(self, batch: Batch, step_s: float) -> StepOutput:
        """Every row has read all that is before it, and yields its tokens."""
        rows = []
        for row, work in zip(batch.rows, self._work, strict=True):
            self._adapters.check(work.seq)
            self._check_read(work)
            may_postpone = batch.may_postpone and not self._keeps_states  # as `Engine.step` has it
            if row.seq.grammar and row.num_known_tokens == 1 and may_postpone and self._postponed():
                rows.append(RowOutput((), is_postponed=True))
                continue
            if row.draft:
                rows.append(verified_output(row, [(token,) for token in self._verify(row, work)]))
                continue
            runs = tuple((token,) for token in self._sample(work))
            scores = work.answer.prompt_logprobs[work.start : work.end] if work.scores else ()
            rows.append(RowOutput(runs, scores, pooled=state_of(work.tags[index] for index in row.pooled_tokens)))
        self._work = []
        self.num_steps += 1
        rows = with_forced(batch, rows)
        return StepOutput(rows, step_s, batch.num_tokens, 0.1 * step_s if batch.swap_out or batch.swap_in else 0.0)

    def _check_read(self, work: _Work) -> None:
        """The model has read all that is known; its draft model that, or no more than what lies in full blocks."""
        reader, own = f"{self._name} for {work.seq.request_id}", self._num_own_layers
        if self._keeps_states:
            self._memory.check(work.table, work.answer, work.end, reader, start=work.start)
            return
        self._memory.check(work.table, work.answer, work.end, reader, range(own), start=work.start)
        if own < self._memory.num_layers:
            size = self._memory.block_size
            read = min(work.end, work.draft_start + len(work.draft_tags)) if work.draft_tags else 0
            end = max(read, work.end // size * size)
            self._memory.check(work.table, work.answer, end, f"the draft of {reader}", range(own, own + 1))

    def _sample(self, work: _Work) -> Iterator[SampledToken]:
        answers = self._oracles[work.seq.request_id].answers
        for choice in work.choices:
            tokens = answers[choice].tokens
            if work.end >= len(tokens):
                raise Breach("I6", f"{self._name} goes on with {work.seq.request_id}/{choice} after its end")
            yield sampled(tokens[work.end])

    def _verify(self, row: BatchRow, work: _Work) -> Iterator[SampledToken]:
        """What is drawn after the known tokens, and after each drafted one: anything where that is another's answer."""
        right = work.answer.tokens[work.end :]
        if not right:
            raise Breach("I6", f"{self._name} goes on with {work.seq.request_id}/{work.seq.choice} after its end")
        for index in range(1 + len(row.draft)):
            is_right = index < len(right) and row.draft[:index] == tuple(right[:index])
            yield sampled(right[index] if is_right else work.tags[index] % VOCAB_SIZE)
