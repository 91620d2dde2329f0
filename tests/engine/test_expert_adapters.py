"""Adapters of experts: a batch of many yields what each merged model yields alone, on several ranks and in C++ too."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.adapter import AdapterTask
from kvferry.common.errors import ConfigError
from kvferry.engine import choose
from kvferry.engine.adapters import open_adapters
from kvferry.engine.engine import Engine
from kvferry.engine.nn.expert_adapters import ExpertSlots
from kvferry.engine.nn.experts import SparseMLP
from kvferry.engine.ranks.group import RankGroup
from kvferry.models.adapter import inspect_adapter
from kvferry.models.config import ModelConfig
from kvferry.models.families.experts import DEEPSEEK_V2
from kvferry.models.families.table import FAMILIES
from kvferry.models.parts.expert_plan import ExpertPlan

from ..adapters import merge, merged_model, write_adapter
from ..deepseek import EXPERTS, write_deepseek
from ..engine_driver import Driver, engine_config, make_engine, prompts
from ..transformers_checkpoints import SMALL, write_model
from .test_adapters import answered, expected, judged, put, sequence

QWEN3 = SMALL | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": QWEN3 | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "Mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
PARTS = {"Qwen3Moe": ("gate_proj", "up_proj", "down_proj"), "Mixtral": ("w1", "w3", "w2")}
EXPERTS_ALONE = r"\.experts\."
LENGTHS = [3, 17, 40, 1, 30, 9, 64, 20]
NEAR = 2e-3  # of log-probabilities that float32 rounds otherwise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    root = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        if not (root / kind).exists():
            write_model(root / kind, getattr(transformers, f"{kind}Config")(**MODELS[kind]))
        return root / kind

    return model


def write_adapters(folder: Path, model_dir: Path, kind: str, **fields: Any) -> list[Path]:
    """Write seven: of all experts, some of them, one part of them, with attention, of attention alone; most unlike."""
    gate, up, down = PARTS[kind]
    shapes: list[tuple[int, Sequence[str], str, bool]] = [
        (4, (gate, up, down), EXPERTS_ALONE, False),
        (16, (gate, up, down), r"\.experts\.[0-2]\.", True),
        (8, (down,), EXPERTS_ALONE, False),
        (13, (up,), r"layers\.0.*\.experts\.[13]\.", True),
        (8, ("q_proj", "o_proj", gate, down), "", False),
        (16, ("q_proj", "v_proj"), "", False),
        (5, (gate,), EXPERTS_ALONE, True),
    ]
    return [
        write_adapter(
            folder / str(i), model_dir, rank=rank, targets=targets, only=only, rslora=rs, seed=i, alpha=8 + i, **fields
        )
        for i, (rank, targets, only, rs) in enumerate(shapes)
    ]


class Adapted(NamedTuple):
    """A model, its adapters, and what is said of prompts of LENGTHS: by the merged models, and by itself the last."""

    model_dir: Path
    adapters: list[Path]
    wanted: list[list[int]]  # by each of its prompt
    judged: list[list[tuple[int, float]]]  # by each of the longest
    plain: list[list[int]]  # by the model without adapters of all


@pytest.fixture(scope="module")
def adapted(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    @cache
    def adapted(kind: str) -> Adapted:
        folder, model_dir, ids = tmp_path_factory.mktemp("adapted"), models(kind), prompts(LENGTHS)
        adapters = write_adapters(folder, model_dir, kind)
        found = Adapted(model_dir, adapters, [], [], answered(model_dir, ids))
        merged = [merge(model_dir, path, folder / f"merged-{path.name}") for path in adapters]
        for path, prompt in zip([*merged, model_dir], ids, strict=True):
            driver = Driver(make_engine(path, max_model_len=256))
            found.wanted.append(driver.generate([driver.add(prompt)])[0])
            found.judged.extend(judged(driver, [ids[6]], [None]))
        return found

    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_mixed_batches_equal_merged_models(adapted: Callable[[str], Adapted], kind: str, exact: bool) -> None:
    model_dir, adapters, wanted, theirs, plain = adapted(kind)
    slots: list[int | None] = [0, 1, 2, 3, 4, 5, 6, None]
    fields = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 16}
    engine = make_engine(model_dir, 256, max_model_len=256, deterministic=exact, **fields)
    for slot, path in enumerate(adapters):
        put(engine, slot, path)
    driver = Driver(engine)
    ids = prompts(LENGTHS)
    alone = [driver.generate([sequence(driver, prompt, slot)])[0] for slot, prompt in zip(slots, ids, strict=True)]
    mixed = driver.generate([sequence(driver, prompt, slot) for slot, prompt in zip(slots, ids, strict=True)], chunk=11)
    assert alone == mixed == wanted
    assert sum(one != other for one, other in zip(wanted, plain, strict=True)) > 4  # they do something
    for own in range(5):
        [found] = judged(driver, [ids[6]], [own], 20)
        assert [token for token, _ in found] == [token for token, _ in theirs[own]]
        assert [value for _, value in found] == pytest.approx([value for _, value in theirs[own]], abs=NEAR)


def test_rows_without_factors_are_the_models_own_to_the_bit(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Also those with an adapter of attention alone, which are what they are without the others."""
    model_dir = models("Qwen3Moe")
    adapters = write_adapters(tmp_path, model_dir, "Qwen3Moe")
    fields = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16, "deterministic": True}
    before, engine = (make_engine(model_dir, 256, **fields) for _ in range(2))
    ids = prompts([21, 33, 12, 40])
    put(before, 0, adapters[5])
    blocks = [layer.feed_forward for layer in before.runner.decoder.layers]  # type: ignore[attr-defined]
    sparse = [block for block in blocks if isinstance(block, SparseMLP)]
    assert len(sparse) == 2
    assert all(linear.adapters is None for block in sparse for linear in block.adapted_linears())  # it costs nothing
    wanted = judged(Driver(before), ids[:2], [0, None])
    for slot, index in enumerate((5, 0, 1)):
        put(engine, slot, adapters[index])
    together = judged(Driver(engine), ids, [0, None, 1, 2])
    assert together[:2] == wanted
    for prompt, slot, found in zip(ids[2:], (1, 2), together[2:], strict=True):  # nor do those with factors feel others
        assert judged(Driver(engine), [prompt], [slot], 7) == [found]


def load(engine: Engine, group: RankGroup | None, adapters: Sequence[Path]) -> list[str]:
    """Load one after another into slots 0, 1, ... on all ranks. Returns what went wrong with each."""
    loader = open_adapters(engine, group)
    assert loader is not None
    loaded = threading.Event()
    loader.wake = loaded.set
    errors = []
    for slot, path in enumerate(adapters):
        loader.submit(AdapterTask(inspect_adapter(path).digest, str(path), slot, ()))
        while not (results := loader.results()):
            assert loaded.wait(30)
            loaded.clear()
        errors += [result.error for result in results]
    loader.close()
    return errors


def split_fields(folder: Path, split: str) -> dict[str, object]:
    """Return settings of a part of each expert, of whole ones, of a plan with replicas, of exchanged rows."""
    plan = ExpertPlan(8, 2, {0: ((0, 1, 2, 3, 5, 6), (0, 1, 2, 4, 5, 7))})
    (folder / "plan.json").write_text(plan.text())
    whole: dict[str, object] = {"enable_expert_parallel": True}
    return {
        "parts": {},
        "whole": whole,
        "plan": whole | {"expert_plan": folder / "plan.json"},
        "exchange": whole | {"expert_exchange": "all_to_all"},
        "exact exchange": whole | {"expert_exchange": "all_to_all", "deterministic": True},
    }[split]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["parts", "whole", "plan", "exchange", "exact exchange"])
def test_ranks_share_adapters_of_experts(adapted: Callable[[str], Adapted], tmp_path: Path, split: str) -> None:
    model_dir, adapters, wanted, *_ = adapted("Qwen3Moe")
    lora = {"enable_lora": True, "max_loras": 7, "max_lora_rank": 16}
    config = engine_config(model_dir, tensor_parallel_size=2, **lora, **split_fields(tmp_path, split))
    group = RankGroup.start(config, num_blocks=128)
    try:
        engine = Engine(config, tp_size=2, num_blocks=128, group=group)
        assert load(engine, group, adapters) == [""] * 7
        driver = Driver(engine)
        slots: list[int | None] = [0, 1, 2, 3, 4, 5, 6, None]
        seqs = [sequence(driver, prompt, slot) for prompt, slot in zip(prompts(LENGTHS), slots, strict=True)]
        found = driver.generate(seqs, chunk=25)
    finally:
        group.close()
    assert found == wanted


@pytest.mark.parametrize("exchange", ["one rank", "sum", "all_to_all"])
def test_shared_experts_are_adapted(tmp_path: Path, exchange: str) -> None:
    """DeepSeek's, which every row takes; of rows that are exchanged a rank has them whole."""
    fields: dict[str, Any] = EXPERTS["v2"]
    model_dir = write_deepseek(tmp_path / "model", "v2", **fields)
    targets = ("gate_proj", "up_proj", "down_proj")
    adapters = [
        write_adapter(tmp_path / "a", model_dir, rank=8, targets=targets),
        write_adapter(tmp_path / "b", model_dir, rank=4, targets=targets, only="shared_experts", seed=1),
    ]
    size = 1 if exchange == "one rank" else 2
    split = {} if size == 1 else {"enable_expert_parallel": True, "expert_exchange": exchange}
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    config = engine_config(model_dir, tensor_parallel_size=size, **lora, **split)
    group = RankGroup.start(config, num_blocks=64) if size > 1 else None
    try:
        engine = Engine(config, tp_size=size, num_blocks=64, group=group)
        assert load(engine, group, adapters) == ["", ""]
        driver = Driver(engine)
        ids = prompts([33, 5, 20])
        slots: list[int | None] = [0, 1, None]
        found = driver.generate([sequence(driver, prompt, slot) for prompt, slot in zip(ids, slots, strict=True)])
    finally:
        if group is not None:
            group.close()
    paths = [*adapters, None]
    assert found == [expected(model_dir, path, prompt, tmp_path) for path, prompt in zip(paths, ids, strict=True)]


def write_bfloat16(models: Callable[[str], Path], kind: str, target: Path) -> Path:
    tensors = load_file(models(kind) / "model.safetensors")
    target.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, target / "model.safetensors")
    raw = json.loads((models(kind) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    return target


def assert_near(found: list[tuple[int, float]], wanted: list[tuple[int, float]], tolerance: float) -> None:
    apart = [abs(one - other) for (_, one), (_, other) in zip(found, wanted, strict=True)]
    assert median(apart) < tolerance, apart


def native_engine(model_dir: Path, **fields: object) -> Engine:
    lora = {"enable_lora": True, "max_loras": 7, "max_lora_rank": 16, "dtype": "bfloat16", "max_model_len": 512}
    engine = make_engine(model_dir, 256, **lora, **fields)
    if type(engine.runner).__name__ != "NativeRunner":
        pytest.skip("no native code on this machine")
    return engine


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "isa"), [("Qwen3Moe", "auto"), ("Qwen3Moe", "avx2"), ("Mixtral", "auto")])
def test_cpp_adds_what_torch_adds(models: Callable[[str], Path], tmp_path: Path, kind: str, isa: str) -> None:
    """In bfloat16 log-probabilities stay near the merged model's in float32, and exact ones keep their bits."""
    model_dir = write_bfloat16(models, kind, tmp_path / "model")
    plain_dir = merged_model(model_dir, None, tmp_path / "plain")
    adapters = write_adapters(tmp_path, plain_dir, kind, dtype=torch.bfloat16)
    ids = prompts([30, 5, 150, 64, 20, 41, 9, 33])
    slots: list[int | None] = [0, 1, 2, 3, 4, 5, 6, None]
    answers = []
    for num_threads in (1, 3):
        engine = native_engine(model_dir, deterministic=True, cpu_isa=isa, num_threads=num_threads)
        for slot, path in enumerate(adapters):
            put(engine, slot, path)
        driver = Driver(engine)
        answers += [judged(driver, ids, slots, chunk) for chunk in (10**9, 37)]
        answers.append([judged(driver, [ids[i]], [slot])[0] for i, slot in enumerate(slots)])
    assert all(answer == answers[0] for answer in answers)
    plain = Driver(make_engine(plain_dir, max_model_len=512, dtype="float32"))
    merged = [merge(plain_dir, path, tmp_path / f"{path.name}-wide") for path in adapters]
    for i, path in enumerate([*merged, plain_dir]):
        engine = make_engine(path, max_model_len=512, dtype="float32")
        wanted, without = judged(Driver(engine), [ids[i]], [None])[0], judged(plain, [ids[i]], [None])[0]
        assert_near(answers[0][i], wanted, 0.1)
        if path != plain_dir:  # it is far from the model without the adapter
            assert median(abs(one - other) for (_, one), (_, other) in zip(wanted, without, strict=True)) > 0.2, i


@pytest.mark.slow
@pytest.mark.parametrize("split", ["parts", "whole", "plan"])
def test_cpp_on_two_ranks(models: Callable[[str], Path], tmp_path: Path, split: str) -> None:
    model_dir = write_bfloat16(models, "Qwen3Moe", tmp_path / "model")
    adapters = write_adapters(tmp_path, model_dir, "Qwen3Moe")
    ids = prompts([30, 5, 150])
    one = native_engine(model_dir)
    for slot, path in enumerate(adapters):
        put(one, slot, path)
    wanted = judged(Driver(one), ids, [0, 1, None])
    lora = {"enable_lora": True, "max_loras": 7, "max_lora_rank": 16, "dtype": "bfloat16", "max_model_len": 512}
    config = engine_config(model_dir, tensor_parallel_size=2, **lora, **split_fields(tmp_path, split))
    group = RankGroup.start(config, num_blocks=128)
    try:
        engine = Engine(config, tp_size=2, num_blocks=128, group=group)
        assert load(engine, group, adapters) == [""] * 7
        found = judged(Driver(engine), ids, [0, 1, None])
    finally:
        group.close()
    for row, other in zip(found, wanted, strict=True):
        assert_near(row, other, 0.1)


def test_cpp_adapts_shared_and_rounded_experts(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "Qwen3MoeForCausalLM", replace(FAMILIES["Qwen3MoeForCausalLM"], experts=DEEPSEEK_V2))
    model_dir = write_bfloat16(models, "Qwen3Moe", tmp_path / "model")
    tensors, raw = load_file(model_dir / "model.safetensors"), json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(raw | {"n_shared_experts": 1, "topk_method": "greedy"}))
    for name in [name for name in tensors if ".experts.0." in name]:
        tensors[name.replace(".experts.0.", ".shared_experts.")] = tensors[name].flip(0).contiguous()
    save_file(tensors, model_dir / "model.safetensors")
    path = write_adapter(tmp_path / "a", model_dir, rank=8, targets=PARTS["Qwen3Moe"], only="experts")
    ids = prompts([40, 100])
    wanted = judged(Driver(make_engine(merge(model_dir, path, tmp_path / "merged"), dtype="float32")), ids, [None] * 2)
    for quantization in (None, "int8"):
        engine = native_engine(model_dir, quantization=quantization)
        put(engine, 0, path)
        for row, other in zip(judged(Driver(engine), ids, [0, 0]), wanted, strict=True):
            assert_near(row, other, 0.1 if quantization is None else 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_beside_steps_change_nothing(models: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    """Experts' matrices are made, filled and given up while all threads of a step read others."""
    model_dir = models("Qwen3Moe")
    adapters = write_adapters(tmp_path, model_dir, "Qwen3Moe")
    fields = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "dtype": dtype, "num_threads": 3}
    engine = make_engine(model_dir, 256, **fields, deterministic=dtype == "bfloat16")
    put(engine, 0, adapters[2])
    driver, ids = Driver(engine), prompts([30, 5, 90])
    wanted = judged(driver, ids, [0, None, 0], 20)
    ended = threading.Event()

    def keep_loading() -> None:
        for turn in range(40):
            put(engine, 1 + turn % 3, adapters[turn % 7])
        ended.set()

    thread = threading.Thread(target=keep_loading)
    thread.start()
    found = [judged(driver, ids, [0, None, 0], 20)]
    while not ended.is_set():
        driver = Driver(engine)
        found.append(judged(driver, ids, [0, None, 0], 20))
    thread.join()
    for answer in found:
        for row, other in zip(answer, wanted, strict=True):
            assert_near(row, other, 1e-4)


def spoil(path: Path, name: str, rows: int) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if name in key)
    tensors[key] = tensors[key][:rows].contiguous()
    save_file(tensors, path / "adapter_model.safetensors")


def test_a_wrong_shape_of_one_experts_matrix_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = models("Qwen3Moe")
    path = write_adapter(tmp_path / "a", model_dir, targets=PARTS["Qwen3Moe"], only=EXPERTS_ALONE)
    inspect_adapter(path).check(ModelConfig.from_dir(model_dir), 16)
    spoil(path, "layers.2.mlp.experts.5.up_proj.lora_B", 32)
    message = r"layers\.2\.mlp\.experts\.5\.up_proj make \[32, 64\]; the model's is \[40, 64\]"
    with pytest.raises(ConfigError, match=message):
        inspect_adapter(path).check(ModelConfig.from_dir(model_dir), 16)
    engine = make_engine(model_dir, enable_lora=True, max_loras=1)
    with pytest.raises(ConfigError, match=message):
        put(engine, 0, path)


def test_memory_is_taken_when_it_is_needed_and_not_beyond(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "free_memory_bytes", lambda: 64 << 10)
    model_dir = models("Qwen3Moe")
    engine = make_engine(model_dir, enable_lora=True, max_loras=1)
    small = write_adapter(tmp_path / "small", model_dir, rank=4, targets=("up_proj",), only=r"layers\.0.*experts\.1\.")
    large = write_adapter(tmp_path / "large", model_dir, rank=16, targets=PARTS["Qwen3Moe"], only=EXPERTS_ALONE)
    attention = write_adapter(tmp_path / "attention", model_dir, rank=16, targets=("q_proj",))
    with pytest.raises(ConfigError, match="its matrices for experts take 0 MiB, of free memory 0 MiB may be taken"):
        put(engine, 0, large)
    assert engine.adapters is not None
    with torch.inference_mode():
        weights = engine.adapters.read(small)[1]
        engine.adapters.put(0, weights)
    memory = weakref.ref(next(iter(weights.values())).down.untyped_storage())
    del weights
    assert memory() is not None
    put(engine, 0, attention)
    assert engine.adapters.experts._in_slots == {0: ()}
    assert memory() is None, "neither a slot nor the host has it any more"


def test_experts_that_no_form_takes_are_refused(models: Callable[[str], Path]) -> None:
    engine = make_engine(models("Mixtral"))
    blocks = [layer.feed_forward for layer in engine.runner.decoder.layers]  # type: ignore[attr-defined]
    slots, module = ExpertSlots(blocks, refusal="a reason"), "model.layers.1.block_sparse_moe.experts.3.w2"
    assert module in slots
    with pytest.raises(ConfigError, match=r"experts\.3\.w2; a reason"):
        slots.find(module)
