"""States on a device in float32, beside attention on the host: log-probabilities are those of transformers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from kvferry.engine.cuda.states import DeviceStates
from kvferry.engine.nn.attention.base import Scores
from kvferry.engine.nn.attention.page_index import PageIndex
from kvferry.engine.nn.attention.paged_torch import CPUAttention
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.nn.plan import StepPlan, step_tensors
from kvferry.engine.nn.states import ForeignStateError
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig

from ...engine_driver import prompts
from ...transformers_checkpoints import SMALL, STATES, write_model
from ..test_states import VARIANTS
from ..transformers_reference import reference_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
BLOCK, NUM_BLOCKS, SPARE = 16, 24, 23
TABLES = ([5, 17, 2, 9, 11], [8, 1, 20, 4, 3], [14, 6, 0, 7, 21])  # of three sequences
LENGTH = 5 * BLOCK
NEAR = 0.02  # of log-probabilities that reach over some 40; the order of sums moves a few by a fifth of that


class HostAttention(CPUAttention):
    """Attends on the host, in float32, which CUDA's kernels do not."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        return super().forward(q.cpu(), k.cpu(), v.cpu(), layer_id).to(q.device)


class Bench:
    """A decoder on the device, and three sequences whose tokens are given."""

    def __init__(self, model_dir: Path) -> None:
        self.model = ModelConfig.from_dir(model_dir)
        self.tokens = prompts([LENGTH] * len(TABLES), 512)
        self.computed = [0] * len(TABLES)
        self.decoder = Decoder(self.model, Communicator(), dtype=torch.float32, device=CUDA)
        load_weights(self.decoder, model_dir, load_format="auto", seed=0)
        own, shape = self.model.states, (2, self.model.num_kv_heads, BLOCK, self.model.head_dim)
        assert own is not None and self.decoder.states is not None
        num_pages = own.num_pages(torch.empty(shape).nbytes)
        self.pages = torch.full((num_pages, NUM_BLOCKS, *shape), torch.nan, device=CUDA)
        self.decoder.states.attach(self.pages)
        self.states = DeviceStates(self.decoder.states, CUDA, BLOCK)
        kept = torch.zeros(len(self.model.kv_layers), NUM_BLOCKS, *shape)
        scores = Scores(scale=self.model.score_scale)
        self.attention = HostAttention(kept, self.model.num_qo_heads, self.model.kv_windows, scores)

    def step(self, counts: dict[int, int], *, is_decode: bool = False, num_padding: int = 0) -> dict[int, Tensor]:
        """Feed each sequence's next tokens. Returns log-probabilities of what follows each, [fed, vocab_size]."""
        plan = self._plan(counts)
        ids, positions, metadata = step_tensors(plan, BLOCK)
        self.attention.plan(metadata)
        if is_decode:
            self._begin_rows(plan, num_padding)
        else:
            rows, uploads = self.states.step(plan)
            self.states.begin(rows, uploads.to(CUDA))
        ids = torch.cat((ids, torch.zeros(num_padding, dtype=torch.int32)))
        positions = torch.cat((positions, torch.zeros(num_padding, dtype=torch.int64)))
        hidden = self.decoder.forward(ids.long().to(CUDA), positions.to(CUDA), self.attention)
        self.states.report()
        found = self.decoder.logits(hidden).cpu().log_softmax(-1)[: len(ids) - num_padding]
        self.states.check()
        for index, count in counts.items():
            self.computed[index] += count
        return dict(zip(counts, torch.split(found, list(counts.values())), strict=True))

    def _plan(self, counts: dict[int, int]) -> StepPlan:
        ids, starts, lengths, blocks = (array("i") for _ in range(4))
        for index, count in counts.items():
            start = self.computed[index]
            ids.extend(self.tokens[index][start : start + count])
            starts.append(start)
            lengths.append(count)
            blocks.extend(TABLES[index][: -(-(start + count) // BLOCK)])
        return StepPlan(ids.tobytes(), starts.tobytes(), lengths.tobytes(), blocks.tobytes(), b"", b"", ())

    def _begin_rows(self, plan: StepPlan, num_padding: int) -> None:
        _, positions, metadata = step_tensors(plan, BLOCK)

        def uploaded(values: Tensor, padding: Sequence[int]) -> Tensor:
            return torch.cat((values.int(), torch.tensor(padding, dtype=torch.int32))).to(CUDA)

        ends = [int(metadata.paged_kv_indptr[-1]) + 1 + row for row in range(num_padding)]
        index = PageIndex(
            row_of_token=torch.empty(0, dtype=torch.int32, device=CUDA),
            positions=uploaded(positions, [0] * num_padding),
            paged_kv_indptr=uploaded(metadata.paged_kv_indptr, ends),
            paged_kv_indices=uploaded(metadata.paged_kv_indices, [SPARE] * num_padding),
            paged_kv_last_page_len=torch.empty(0, dtype=torch.int32, device=CUDA),
        )
        self.states.begin_rows(index)


def _bench(tmp_path: Path, variant: str) -> Bench:
    kind, fields = VARIANTS[variant]
    write_model(tmp_path, getattr(transformers, f"{kind}Config")(**SMALL | STATES | fields))
    return Bench(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_every_token_is_followed_by_what_transformers_has_follow(tmp_path: Path, variant: str) -> None:
    """Chunks within a block, up to its end and over several, rows of one token beside them, then decode steps."""
    bench = _bench(tmp_path, variant)
    found: dict[int, list[Tensor]] = {index: [] for index in range(len(TABLES))}
    for counts in ({0: 1, 1: 16}, {0: 1, 1: 1, 2: 40}, {1: 30, 0: 1, 2: 8}, {0: 13}):
        for index, part in bench.step(counts).items():
            found[index].append(part)
    assert bench.computed == [16, 47, 48]  # one at the end of a block, one before it, one behind it
    for num_padding in (1, 5, 1):
        for index, part in bench.step({0: 1, 1: 1, 2: 1}, is_decode=True, num_padding=num_padding).items():
            found[index].append(part)
    for index, parts in found.items():
        expected = reference_logprobs(tmp_path, tuple(bench.tokens[index][: bench.computed[index]]))
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=NEAR)


@torch.inference_mode()
def test_a_state_of_other_tokens_is_counted_in_each_layer(tmp_path: Path) -> None:
    bench = _bench(tmp_path, "qwen3.5")
    bench.step({0: 20, 1: 20})
    for is_decode, counts in ((False, {0: 2, 1: 2}), (False, {0: 1, 1: 1}), (True, {0: 1, 1: 1})):
        bench.computed[0] -= 1
        with pytest.raises(ForeignStateError, match="3 states are not those"):
            bench.step(counts, is_decode=is_decode)
        bench.computed[0] += 1
        bench.computed[1] += counts[1]  # that row was right, and goes on
    bench.step({1: 1}, is_decode=True)
    with pytest.raises(ForeignStateError, match="3 states are not those"):
        bench.step({0: 1})  # what the wrong steps left behind is nobody's
