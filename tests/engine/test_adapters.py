"""A batch of many adapters yields the tokens that each merged model yields alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvferry.common.adapter import AdapterTask
from kvferry.common.errors import ConfigError
from kvferry.common.request import SamplingParams, Sequence
from kvferry.engine.adapters import open_adapters
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.group import RankGroup
from kvferry.engine.weights.slot_matrices import AdapterWeights
from kvferry.models.adapter import inspect_adapter, read_adapter

from ..adapters import ALL, merge, merged_model, write_adapter
from ..checkpoints import Shape, write_checkpoint
from ..engine_driver import Driver, engine_config, make_engine, prompts

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
    assert engine.adapters is not None
    with torch.inference_mode():
        engine.adapters.put(slot, engine.adapters.read(path)[1])


def sequence(driver: Driver, prompt: list[int], slot: int | None) -> Sequence:
    seq = driver.add(prompt)
    seq.held_adapter = None if slot is None else Held(slot)
    return seq


def assert_adapted_as_merged(source: Path, folder: Path, targets: tuple[str, ...], prompt: list[int]) -> None:
    """Answers by an adapter of these matrices, in chunks, are those of the model that has it merged, and no others'."""
    adapter = write_adapter(folder / "adapter", source, rank=8, targets=targets, seed=3, alpha=32)
    engine = make_engine(source, enable_lora=True, max_loras=2)
    put(engine, 1, adapter)
    driver, merged = Driver(engine), Driver(make_engine(merge(source, adapter, folder / "merged")))
    wanted = merged.generate([merged.add(prompt)])
    assert driver.generate([sequence(driver, prompt, 1)], chunk=9) == wanted
    assert driver.generate([driver.add(prompt)], chunk=9) != wanted


def said_by_ranks(model_dir: Path, path: Path, ids: list[list[int]]) -> list[list[int]]:
    """Return what two ranks answer by an adapter, which they have read from its files."""
    digest = inspect_adapter(path).digest
    fields = {"tensor_parallel_size": 2, "enable_lora": True, "max_loras": 1, "max_cpu_loras": 2}
    config = engine_config(model_dir, **fields)
    group = RankGroup.start(config, num_blocks=64)
    try:
        engine = Engine(config, tp_size=2, num_blocks=64, group=group)
        loader = open_adapters(engine, group)
        assert loader is not None
        loaded = threading.Event()
        loader.wake = loaded.set
        loader.submit(AdapterTask(digest, str(path), 0, ()))
        while not (results := loader.results()):
            assert loaded.wait(20)
            loaded.clear()
        assert [result.error for result in results] == [""]
        driver = Driver(engine)
        found = driver.generate([sequence(driver, prompt, 0) for prompt in ids], chunk=20)
        loader.close()
    finally:
        group.close()
    return found


def expected(model_dir: Path, adapter: Path | None, prompt: list[int], folder: Path) -> list[int]:
    merged = model_dir if adapter is None else merge(model_dir, adapter, folder / f"merged-{adapter.name}")
    [answer] = answered(merged, [prompt])
    return answer


def answered(model_dir: Path, ids: list[list[int]]) -> list[list[int]]:
    """Return what a model without adapters answers to each prompt alone."""
    driver = Driver(make_engine(model_dir, max_model_len=256))
    return [driver.generate([driver.add(prompt)])[0] for prompt in ids]


@pytest.mark.slow
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
        plain = answered(model_dir, ids)
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


@pytest.mark.parametrize("isa", ["auto", "avx2"])
def test_cpp_adds_what_torch_adds(tmp_path: Path, isa: str) -> None:
    """In bfloat16 log-probabilities stay near the merged model's in float32, and exact ones keep their bits."""
    shape = Shape(hidden_size=128, head_dim=32, intermediate_size=200, num_layers=3)
    model_dir = write_checkpoint(tmp_path / "model", tokenizer=False, dtype="bfloat16", shape=shape)
    plain_dir = merged_model(model_dir, None, tmp_path / "plain")
    adapters = [
        write_adapter(tmp_path / str(i), plain_dir, rank=rank, targets=TARGETS[i], seed=i, dtype=torch.bfloat16)
        for i, rank in enumerate([8, 64, 13, 32])
    ]
    fields = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 64, "dtype": "bfloat16", "cpu_isa": isa}
    engine = make_engine(model_dir, 256, max_model_len=512, deterministic=True, **fields)
    if type(engine.runner).__name__ != "NativeRunner":
        pytest.skip("no native code on this machine")
    for slot, path in enumerate(adapters):
        put(engine, slot, path)
    driver = Driver(engine)
    ids = prompts([30, 5, 150, 64, 20])
    slots: list[int | None] = [0, 1, 2, 3, None]
    alone = [judged(driver, [ids[i]], [slot])[0] for i, slot in enumerate(slots)]
    for chunk in (10**9, 37):
        assert judged(driver, ids, slots, chunk) == alone
    assert judged(driver, [ids[4]] * 3, [1, None, 1])[1] == alone[4]
    merged = [merged_model(plain_dir, path, tmp_path / f"{path.name}-wide") for path in adapters]
    for i, path in enumerate([*merged, plain_dir]):
        wanted = judged(Driver(make_engine(path, max_model_len=512, dtype="float32")), [ids[i]], [None])[0]
        spread = max(value for _, value in wanted) - min(value for _, value in wanted)
        apart = [abs(one - other) for (_, one), (_, other) in zip(alone[i], wanted, strict=True)]
        assert sum(apart) / len(apart) < 0.01 * spread, (i, apart)


def judged(
    driver: Driver, ids: list[list[int]], slots: Ids[int | None], chunk: int = 10**9
) -> list[list[tuple[int, float]]]:
    """Feed the prompts together; return the log-probability of each prompt token, and of the next ones."""
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    seqs = [sequence(driver, prompt, slot) for prompt, slot in zip(ids, slots, strict=True)]
    found: dict[int, list[tuple[int, float]]] = {id(seq): [] for seq in seqs}
    for seq in seqs:
        seq.sampling = sampling
    while running := [seq for seq in seqs if seq.num_output_tokens < 4]:
        order = sorted(running, key=lambda seq: min(chunk, seq.num_uncomputed_tokens) != 1)
        driver.step([(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in running])
        for seq, output in zip(order, driver.outputs[-1].rows, strict=True):
            found[id(seq)] += [(token.token_id, token.logprob or 0.0) for token in output.prompt_logprobs]
            if output.runs and seq.num_output_tokens == 1:
                found[id(seq)].append((output.runs[0][0].token_id, output.runs[0][0].logprob or 0.0))
                seq.token_ids[-1] = 7
            elif output.runs:
                seq.token_ids[-1] = 7
    return [found[id(seq)] for seq in seqs]


def test_a_slot_keeps_nothing_of_the_adapter_before(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    engine = make_engine(model_dir, enable_lora=True, max_loras=1, max_lora_rank=64)
    driver = Driver(engine)
    prompt = prompts([12])[0]
    for path in (adapters[3], adapters[5], adapters[0]):  # ranks 64, 24, 8; fewer and fewer modules, then all
        put(engine, 0, path)
        assert driver.generate([sequence(driver, prompt, 0)])[0] == expected(model_dir, path, prompt, tmp_path)


@pytest.mark.slow
def test_fused_modules_are_adapted_on_every_rank(tmp_path: Path) -> None:
    """Rows of a rank's queries, keys and values stand apart in the module that all of them are."""
    model_dir = write_checkpoint(tmp_path / "model", "phi3", tokenizer=False)
    targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    path = write_adapter(tmp_path / "a", model_dir, rank=13, targets=targets)
    ids = prompts([1, 33])
    found = said_by_ranks(model_dir, path, ids)
    assert found == [expected(model_dir, path, prompt, tmp_path / str(index)) for index, prompt in enumerate(ids)]


def test_memory_of_adapters_is_used_again(model_dir: Path, adapters: list[Path]) -> None:
    """A piece is free when neither a slot nor the host has what is in it, and no load needs another one then."""
    engine = make_engine(model_dir, dtype="bfloat16", enable_lora=True, max_loras=2, max_lora_rank=64)
    slots = engine.adapters
    if type(engine.runner).__name__ != "NativeRunner" or slots is None:
        pytest.skip("no native code on this machine")
    places: set[int] = set()
    host: dict[int, AdapterWeights] = {}
    with torch.inference_mode():
        for turn, path in enumerate(adapters[:6]):
            host.pop(turn - 2, None)
            slots.clear(turn % 2)
            host[turn] = slots.read(path)[1]
            slots.put(turn % 2, host[turn])
            places.add(next(iter(host[turn].values())).down.data_ptr())
    assert len(places) == 2


def test_what_does_not_fit_the_engine_is_refused(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    engine = make_engine(model_dir, enable_lora=True, max_loras=1, max_lora_rank=16)
    with pytest.raises(ConfigError, match=r"its rank is 64; --max-lora-rank is 16"):
        put(engine, 0, adapters[3])
    other = write_checkpoint(tmp_path / "wide", tokenizer=False, intermediate_size=192)
    path = write_adapter(tmp_path / "a", other, targets=("up_proj",))
    with pytest.raises(ConfigError, match=r"mlp.up_proj make \[192, 64\]; the model's is \[128, 64\]"):
        put(engine, 0, path)


def test_both_ways_to_read_find_one_digest(adapters: list[Path]) -> None:
    assert inspect_adapter(adapters[1]) == read_adapter(adapters[1], lambda _: None, lambda *_: None)
