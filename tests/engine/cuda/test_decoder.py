"""The decoder of fused steps against the plain one: the same logits, layer after layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.engine.cuda.decoder import FusedDecoder, cos_sin_table
from kvferry.engine.nn import decoder as decoders
from kvferry.engine.nn.attention.base import AttentionMetadata, Scores
from kvferry.engine.nn.attention.paged_torch import CPUAttention
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig

from ...checkpoints import Family, Shape, write_checkpoint
from ..nn.test_blocks import Experts
from .torch_kernels import TorchKernels

CPU = torch.device("cpu")
NUM_TOKENS = 20
GROWING = {"rope_theta": 10_000.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _decoder(model_dir: Path) -> Decoder:
    decoder = Decoder(ModelConfig.from_dir(model_dir), Communicator(), dtype=torch.float32, device=CPU)
    load_weights(decoder, model_dir, load_format="auto", seed=0)
    return decoder


def _attention(decoder: Decoder) -> CPUAttention:
    config = decoder.config
    pages = torch.zeros(config.num_layers, 4, 2, config.num_kv_heads, 16, config.head_dim)
    attention = CPUAttention(pages, config.num_qo_heads, config.sliding_windows, Scores(scale=config.score_scale))
    i32 = torch.int32
    attention.plan(
        AttentionMetadata(
            num_decode_rows=0,
            qo_indptr=torch.tensor([0, NUM_TOKENS], dtype=i32),
            paged_kv_indptr=torch.tensor([0, 2], dtype=i32),
            paged_kv_indices=torch.tensor([3, 1], dtype=i32),
            paged_kv_last_page_len=torch.tensor([NUM_TOKENS - 16], dtype=i32),
            kv_lens=(NUM_TOKENS,),
            slot_mapping=torch.cat((3 * 16 + torch.arange(16), 16 + torch.arange(NUM_TOKENS - 16))),
        )
    )
    return attention


@pytest.mark.parametrize(
    ("family", "shape", "config"),
    [
        ("llama", Shape(num_layers=3, biases=True), {}),
        ("llama", Shape(num_layers=3, tie_embeddings=True), {"rope_scaling": LLAMA3_ROPE}),
        ("mistral", Shape(num_layers=3, sliding_window=7), {}),
        ("qwen2", Shape(num_layers=3), {"rope_parameters": YARN}),
        ("qwen3", Shape(num_layers=3, head_dim=32), {}),
        ("granite", Shape(num_layers=3), {}),
        ("olmo2", Shape(num_layers=3), {}),
        ("phi3", Shape(num_layers=3), {}),
        ("ernie4_5", Shape(num_layers=3), {}),
        ("ministral3", Shape(num_layers=3), {"rope_parameters": GROWING}),
        ("gemma3_text", Shape(num_layers=3, head_dim=32), {}),
    ],
)
@torch.inference_mode()
def test_logits_are_those_of_the_plain_decoder(
    tmp_path: Path, family: Family, shape: Shape, config: dict[str, object]
) -> None:
    decoder = _decoder(write_checkpoint(tmp_path, family, tokenizer=False, config=config, shape=shape))
    fused = FusedDecoder(decoder, TorchKernels())
    ids, positions = torch.arange(NUM_TOKENS) * 37 % 512, torch.arange(NUM_TOKENS)
    layers: list[int] = []
    expected = decoder.logits(decoder.forward(ids, positions, _attention(decoder)))
    found = fused.logits(fused.forward(ids, positions.int(), _attention(decoder), layers.append))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert layers == [0, 1, 2]


@torch.inference_mode()
def test_a_feed_forward_without_kernels_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "make_feed_forward", Experts)
    config = ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False))
    decoder = Decoder(config, Communicator(), dtype=torch.float32, device=CPU)
    load_weights(decoder, tmp_path, load_format="dummy", seed=0)
    fused = FusedDecoder(decoder, TorchKernels())
    ids, positions = torch.arange(NUM_TOKENS) * 37 % 512, torch.arange(NUM_TOKENS)
    expected = decoder.logits(decoder.forward(ids, positions, _attention(decoder)))
    found = fused.logits(fused.forward(ids, positions.int(), _attention(decoder)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_table_of_turns_is_what_is_made_for_a_step(tmp_path: Path) -> None:
    decoder = _decoder(write_checkpoint(tmp_path, tokenizer=False))
    table = cos_sin_table(decoder.rotary, 9000, torch.bfloat16)
    assert table.shape == (9000, decoder.config.head_dim)
    positions = torch.tensor([0, 1, 8191, 8192, 8999])
    cos, signed_sin, _ = decoder.rotary(positions, torch.bfloat16)
    half = decoder.config.head_dim // 2
    assert torch.equal(table[positions], torch.cat((cos[:, 0, :half], signed_sin[:, 0, half:]), 1))
