"""Blocks in host memory: what goes out comes back, in whatever block, and a step does all of it before it computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import SamplingParams
from kvferry.engine.engine import Engine
from kvferry.kvcache import host_slots
from kvferry.kvcache.host_slots import SwapPages, num_swap_blocks

from ..checkpoints import write_checkpoint
from ..engine_driver import Driver, engine_config, make_engine, prompts

LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SPEC = KVCacheSpec(model="m", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _pages(dtype: torch.dtype, device: str) -> torch.Tensor:
    values = torch.randint(0, 100, (3, 40, 2, 2, 4, 8), dtype=torch.uint8, device=device)
    return values.view(dtype) if dtype.itemsize == 1 else values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_what_is_copied_out_comes_back_into_other_blocks(dtype: torch.dtype, device: str) -> None:
    pages = _pages(dtype, device)
    before = pages.clone()
    swap = SwapPages(pages, SPEC, 36)
    out = [(block, 35 - block) for block in range(36)]
    swap.copy(out, [])
    if device == "cuda":
        torch.cuda.synchronize()
    assert swap.copy_s > 0 and torch.equal(pages, before)
    pages.zero_()
    swap.copy([], [(slot, block) for block, slot in reversed(out)])
    assert torch.equal(pages[:, :36], before[:, :36])
    assert not pages[:, 36:].any()
    swap.copy([], [])
    assert swap.copy_s == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_block_that_goes_out_is_filled_anew_by_the_same_step(device: str) -> None:
    pages = _pages(torch.float32, device)
    before = pages.clone()
    swap = SwapPages(pages, SPEC, 2)
    swap.copy([(1, 0)], [])
    swap.copy([(2, 1)], [(0, 2)])  # block 2 to slot 1, then block 1's content from slot 0 into block 2
    assert torch.equal(pages[:, 2], before[:, 1])
    swap.copy([], [(1, 5)])
    assert torch.equal(pages[:, 5], before[:, 2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_slots_lie_in_pieces_that_pinned_memory_comes_in(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = _pages(torch.float32, device)
    slot_bytes = pages[:, 0].numel() * 4
    monkeypatch.setattr(host_slots, "_PINNED_BYTES", 5 * slot_bytes + 7)
    swap = SwapPages(pages, SPEC, 12)
    pieces = [len(piece) for piece in swap._host]
    assert pieces == ([12] if device == "cpu" else [5, 5, 2]) and swap.slot_bytes == slot_bytes
    swap.copy([(block, block) for block in range(12)], [])
    swap.settle()
    for block in range(12):
        assert bytes(swap.slot(block)) == pages[:, block].cpu().contiguous().numpy().tobytes()


def test_swapping_takes_a_tenth_of_free_memory_at_most(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(engine_config(model_dir), num_blocks=4)
    config, cuda = engine_config(model_dir, swap_space=None), torch.device("cuda")
    for free_gib, expected in ((10, 1 << 30), (1000, 4 << 30)):
        monkeypatch.setattr(host_slots, "free_memory_bytes", lambda free_gib=free_gib: free_gib << 30)
        count = num_swap_blocks(config, engine.spec, cuda, num_blocks=4, tp_size=1)
        assert count == expected // BLOCK_BYTES


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=False)


def test_the_setting_decides_the_number_of_slots(model_dir: Path) -> None:
    def slots(**fields: object) -> int:
        return Engine(engine_config(model_dir, **fields), num_blocks=64).num_swap_blocks

    assert slots() == slots(swap_space=0) == 0
    assert slots(swap_space=5 * BLOCK_BYTES + 1) == 5
    assert slots(swap_space=None) == 6  # a tenth of the cache


def undisturbed(engine: Engine) -> list[int]:
    driver = Driver(engine)
    (answer,) = driver.generate([driver.add(prompts([40], vocab_size=500)[0], LONG)])
    return answer


def swapped_in_the_middle(engine: Engine) -> list[int]:
    """An answer whose blocks leave the device after some tokens, and come back elsewhere after others were there."""
    driver = Driver(engine)
    prompt, other_prompt = prompts([40, 50], vocab_size=500)
    seq, other = driver.add(prompt, LONG), driver.add(other_prompt, LONG, name="other")
    driver.step([(seq, 40)])
    for _ in range(5):
        driver.step([(seq, 1)])
    table, seq.block_table = seq.block_table, []
    driver.grow(other, 50)
    other.block_table[: len(table)] = table  # its first blocks are those that go out
    out = [(block, 7 - place) for place, block in enumerate(table)]
    output = engine.step(Batch([BatchRow(other, 50)], swap_out=out))
    assert output.swap_s > 0
    assert engine.step(Batch([], swap_in=[(out[0][1], 60)])).rows == []  # copies alone
    fresh = [60, 61, 62]
    seq.block_table = fresh
    rows = Batch([BatchRow(seq, 1)], swap_in=[(slot, fresh[place]) for place, (_, slot) in enumerate(out) if place])
    token = engine.step(rows).rows[0].runs[0][0].token_id
    seq.num_computed_tokens += 1
    seq.token_ids.append(token)
    driver.generate([seq])
    return seq.output_token_ids


def test_an_answer_goes_on_unchanged_from_swapped_blocks(model_dir: Path) -> None:
    engine = make_engine(model_dir, swap_space=8 * BLOCK_BYTES)
    assert swapped_in_the_middle(engine) == undisturbed(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]")
def test_an_answer_goes_on_unchanged_from_swapped_blocks_on_a_gpu(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False, head_dim=64, hidden_size=256, dtype="bfloat16")
    config = engine_config(path, device="cuda", max_num_seqs=8, max_model_len=1024, swap_space=64 << 20)
    engine = Engine(config, num_blocks=128)
    assert swapped_in_the_middle(engine) == undisturbed(engine)
