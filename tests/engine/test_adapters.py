"""A batch of many adapters yields the tokens that each merged model yields alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.common.request import Sequence
from kvferry.engine.engine import Engine
from kvferry.models.adapter import inspect_adapter, read_adapter

from ..adapters import ALL, merge, write_adapter
from ..checkpoints import write_checkpoint
from ..engine_driver import Driver, make_engine, prompts

NUM_ADAPTERS = 32
TARGETS = (ALL, ("q_proj", "v_proj"), ("o_proj", "down_proj"), ("gate_proj", "up_proj", "k_proj"))


@dataclass
class Held:
    """Implements `common.adapter.HeldAdapter`."""

    slot: int | None
    failure: str = ""
    is_open: bool = True


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", tokenizer=False)


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    ranks = [8, 16, 32, 64, 13, 24]
    return [
        write_adapter(
            folder / str(i),
            model_dir,
            rank=ranks[i % 6],
            rslora=i % 5 == 1,
            targets=TARGETS[i % 4],
            seed=i,
            alpha=8 + i,
        )
        for i in range(NUM_ADAPTERS)
    ]


def put(engine: Engine, slot: int, path: Path) -> None:
    adapter, data = read_adapter(path)
    assert engine.adapters is not None
    with torch.inference_mode():
        engine.adapters.put(slot, engine.adapters.cut(adapter.modules, data))


def sequence(driver: Driver, prompt: list[int], slot: int | None) -> Sequence:
    seq = driver.add(prompt)
    seq.held_adapter = None if slot is None else Held(slot)
    return seq


def expected(model_dir: Path, adapter: Path | None, prompt: list[int], folder: Path) -> list[int]:
    merged = model_dir if adapter is None else merge(model_dir, adapter, folder / f"merged-{adapter.name}")
    driver = Driver(make_engine(merged, max_model_len=256))
    return driver.generate([driver.add(prompt)])[0]


@pytest.mark.parametrize("exact", [False, True])
def test_mixed_batches_equal_merged_models(model_dir: Path, adapters: list[Path], tmp_path: Path, exact: bool) -> None:
    engine = make_engine(
        model_dir, 256, max_model_len=256, enable_lora=True, max_loras=8, max_lora_rank=64, deterministic=exact
    )
    driver = Driver(engine)
    lengths = [3, 17, 40, 1, 30, 9, 64, 20]
    for first in range(0, NUM_ADAPTERS if not exact else 8, 8):
        batch = adapters[first : first + 8]
        for slot, path in enumerate(batch):
            put(engine, slot, path)
        ids = [[(token + first) % 512 for token in prompt] for prompt in prompts(lengths)]
        alone = [driver.generate([sequence(driver, prompt, slot)])[0] for slot, prompt in enumerate(ids)]
        mixed = driver.generate([sequence(driver, prompt, slot) for slot, prompt in enumerate(ids)], chunk=11)
        wanted = [expected(model_dir, path, prompt, tmp_path) for path, prompt in zip(batch, ids, strict=True)]
        plain = [expected(model_dir, None, prompt, tmp_path) for prompt in ids]
        assert alone == mixed == wanted
        assert sum(one != other for one, other in zip(wanted, plain, strict=True)) > 5  # they do something


def test_rows_without_an_adapter_are_the_models_own_to_the_bit(model_dir: Path, adapters: list[Path]) -> None:
    plain = Driver(make_engine(model_dir, deterministic=True))
    engine = make_engine(model_dir, deterministic=True, enable_lora=True, max_loras=2, max_lora_rank=64)
    put(engine, 0, adapters[0])
    put(engine, 1, adapters[3])
    driver = Driver(engine)
    prompt, other = prompts([21, 33])
    sampling = plain.add(prompt).sampling
    sampling = type(sampling)(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)

    def run(driver: Driver, slots: list[int | None]) -> list[object]:
        seqs = [sequence(driver, prompt if slot is None else other, slot) for slot in slots]
        for seq in seqs:
            seq.sampling = sampling
        found: list[object] = []
        while any(seq.num_output_tokens < 6 for seq in seqs):
            found.append(driver.step([(seq, seq.num_uncomputed_tokens) for seq in seqs])[slots.index(None)])
        return found

    alone = run(plain, [None])
    assert run(driver, [0, None, 1, 0]) == alone
    assert run(driver, [None]) == alone


def test_a_slot_keeps_nothing_of_the_adapter_before(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    engine = make_engine(model_dir, enable_lora=True, max_loras=1, max_lora_rank=64)
    driver = Driver(engine)
    prompt = prompts([12])[0]
    for path in (adapters[3], adapters[5], adapters[0]):  # ranks 64, 24, 8; fewer and fewer modules, then all
        put(engine, 0, path)
        assert driver.generate([sequence(driver, prompt, 0)])[0] == expected(model_dir, path, prompt, tmp_path)


def test_what_does_not_fit_the_engine_is_refused(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    engine = make_engine(model_dir, enable_lora=True, max_loras=1, max_lora_rank=16)
    with pytest.raises(ConfigError, match=r"its rank is 64; --max-lora-rank is 16"):
        put(engine, 0, adapters[3])
    other = write_checkpoint(tmp_path / "wide", tokenizer=False, intermediate_size=192)
    path = write_adapter(tmp_path / "a", other, targets=("up_proj",))
    with pytest.raises(ConfigError, match=r"mlp.up_proj make \[192, 64\]; the model's is \[128, 64\]"):
        put(engine, 0, path)


def test_both_ways_to_read_find_one_digest(adapters: list[Path]) -> None:
    assert inspect_adapter(adapters[1]) == read_adapter(adapters[1])[0]
