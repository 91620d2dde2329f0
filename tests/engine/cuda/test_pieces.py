"""Small steps as graphs in pieces: what kernels yield that are launched one by one, for one rank and for several."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvferry.benchmarks.gpu.kernels import metadata_of
from kvferry.engine.cuda.decoder import FusedDecoder
from kvferry.engine.cuda.kernels import FusedKernels
from kvferry.engine.cuda.pieces import PieceGraphs
from kvferry.engine.nn.attention.flashinfer import FlashInferAttention
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig

from ...checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
CUDA = torch.device("cuda", 0)
LAYERS = 3
# (tokens before, tokens fed) of each row; rows of one token first.
STEPS = (((0, 1),), ((40, 1), (3, 1), (0, 13)), ((15, 1), (0, 60), (33, 17)), ((0, 16),), ((100, 300),))


class Twins:
    """Stands for the collectives of ranks that all have this one's numbers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_sums = 0

    def allreduce(self, tensors: list[Tensor], options: object = None) -> Twins:
        self.num_sums += 1
        tensors[0].mul_(self.size)
        return self

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Twins:
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self

    def wait(self) -> None:
        """Nothing is under way."""


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("window", [None, 20])
def test_pieces_yield_what_whole_steps_do(tmp_path: Path, num_ranks: int, window: int | None) -> None:
    fields = {"head_dim": 64, "hidden_size": 256, "num_layers": LAYERS, "dtype": "bfloat16", "sliding_window": window}
    path = write_checkpoint(tmp_path, "mistral", tokenizer=False, num_qo_heads=4, num_kv_heads=2, **fields)  # type: ignore[arg-type]
    group = Twins(num_ranks) if num_ranks > 1 else None
    model, comm = ModelConfig.from_dir(path), Communicator(0, num_ranks, group)  # type: ignore[arg-type]
    with torch.inference_mode():
        plain = Decoder(model, comm, dtype=torch.bfloat16, device=CUDA)
        load_weights(plain, path, load_format="auto", seed=0)
        pages = torch.zeros(LAYERS, 64, 2, 2 // num_ranks, 16, 64, dtype=torch.bfloat16, device=CUDA)
        attention = FlashInferAttention(pages, 4 // num_ranks, window)
        decoder = FusedDecoder(plain, FusedKernels())
        attention.warm_up()
        pieces = PieceGraphs(decoder, attention, CUDA)
        pieces.capture()
        assert not pages[:, :-1].any(), "captures write to no page but the spare one"
        for rows in STEPS:
            metadata, _ = metadata_of(rows, 16)
            ids = torch.randint(0, 500, (metadata.num_tokens,), generator=torch.Generator().manual_seed(1)).to(CUDA)
            pages.normal_()
            before = pages.clone()
            attention.plan(metadata)
            expected, written = decoder.forward(ids, attention.positions, attention), pages.clone()
            pages.copy_(before)
            torch.cuda.synchronize()  # a plan's host memory is written to by the next one
            attention.plan(metadata)
            layers, sums = list[int](), group.num_sums if group else 0
            found = pieces.run(ids, attention.positions, layers.append)[: metadata.num_tokens]
            torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(pages.cpu(), written.cpu(), rtol=2e-2, atol=2e-2)
            assert layers == list(range(LAYERS))
            assert group is None or group.num_sums - sums == 1 + 2 * LAYERS
