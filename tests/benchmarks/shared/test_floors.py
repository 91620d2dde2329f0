from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.benchmarks.shared.floors import (
    Rates,
    Work,
    decode_work,
    prefill_work,
)
from kvferry.benchmarks.shared.shapes import write_shape
from kvferry.models.config import ModelConfig
from kvferry.sizing.work import count_params, num_causal_pairs, num_visible_keys


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_dir(write_shape(tmp_path_factory.mktemp("shape"), "llama-3-8b", 40_000))


def test_weights_of_llama_3_8b_add_up_to_its_published_size(llama: ModelConfig) -> None:
    norms = (2 * llama.num_layers + 1) * llama.hidden_size
    assert count_params(llama).layers + 2 * count_params(llama).head + norms == 8_030_261_248


def test_decode_step_reads_every_weight_once_and_128_kib_for_each_cached_token(llama: ModelConfig) -> None:
    weights = count_params(llama).layers + count_params(llama).head
    alone, batch = decode_work(llama, 1, 0, 2, 2 * 128), decode_work(llama, 64, 4096, 2, 2 * 128)
    assert alone.num_bytes == 2 * weights
    assert batch.num_bytes - alone.num_bytes == 64 * 4096 * 128 * 1024
    assert alone.flops == 2 * weights


def test_cache_in_8_bits_halves_its_bytes_and_leaves_the_weights(llama: ModelConfig) -> None:
    alone = decode_work(llama, 1, 0, 2, 2 * 128).num_bytes
    assert decode_work(llama, 8, 1000, 2, 128).num_bytes - alone == 8 * 1000 * 64 * 1024


def test_prefill_is_linear_in_the_weights_and_quadratic_in_the_attention(llama: ModelConfig) -> None:
    n = 32_768
    attention = 2 * llama.num_layers * llama.num_qo_heads * llama.head_dim * n**2
    expected = 2 * count_params(llama).layers * n + attention
    assert prefill_work(llama, n, 2).flops == pytest.approx(expected, rel=1e-4)
    assert attention == pytest.approx(0.28e15, rel=0.01)


def test_prefill_of_one_token_costs_what_its_decode_step_costs(llama: ModelConfig) -> None:
    assert prefill_work(llama, 1, 2).flops == decode_work(llama, 1, 1, 2, 2 * 128).flops


def test_causal_pairs_count_each_query_with_what_it_sees() -> None:
    assert num_causal_pairs(4, None) == 1 + 2 + 3 + 4
    assert num_causal_pairs(5, 2) == 1 + 2 + 2 + 2 + 2
    assert num_causal_pairs(2, 7) == 3


def test_sliding_layers_read_no_more_than_their_window(llama: ModelConfig) -> None:
    half = replace(llama, sliding_windows=(None,) * 16 + (100,) * 16)
    assert num_visible_keys(1000, half) == 16 * 1000 + 16 * 100
    assert num_visible_keys(50, half) == 32 * 50


def test_floor_is_the_longer_of_products_and_reads() -> None:
    rates = Rates(matmul_flops_per_s=100.0, read_bytes_per_s=10.0)
    memory, compute = Work(flops=100, num_bytes=50), Work(flops=900, num_bytes=50)
    assert (memory.floor_s(rates), memory.bound(rates)) == (5.0, "memory")
    assert (compute.floor_s(rates), compute.bound(rates)) == (9.0, "compute")


def test_small_model_with_tied_embeddings_reads_its_head_too(tmp_path: Path) -> None:
    model = replace(ModelConfig.from_dir(write_shape(tmp_path, "llama-tiny", 128)), tie_embeddings=True)
    assert decode_work(model, 1, 0, 2, 2 * 64).num_bytes == 2 * (count_params(model).layers + 512 * 64)
