"""The engine on a CUDA device: graphs, steps prepared ahead, sampling there, pages in 8 bits, layers told of."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from kvferry.common.batch import GpuEvent
from kvferry.common.errors import ConfigError
from kvferry.common.request import SampledToken, SamplingParams, Sequence
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.tests.emulation.stream import COUNTS

from ..checkpoint_shapes import GEMMA_2, GLM_4, GPT_OSS, QWEN3_MOE, SMOLLM_3, write_by_shapes
from ..checkpoints import Family, write_checkpoint
from ..deepseek import EXPERTS, write_deepseek, write_for_cuda
from ..engine_driver import Driver, each_of, engine_config, prompt_logprobs, prompts

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]

SURE_GAP = 0.25  # of log-probability; below it 16 bits may choose another token than float32
NUM_TOKENS = 14
LENGTHS = [5, 16, 31, 33, 17, 14, 9]  # to a block's end and past it, and no more than the longest pieces together
VARIANTS: dict[str, tuple[Family | Literal["deepseek", "shapes"], dict[str, object]]] = {
    "llama": ("llama", {"num_qo_heads": 8, "num_kv_heads": 2}),
    "few queries a head": ("llama", {"num_qo_heads": 3, "num_kv_heads": 3, "hidden_size": 192}),
    "mistral window": ("mistral", {"num_qo_heads": 4, "num_kv_heads": 1, "sliding_window": 20}),
    "qwen2 window": ("qwen2", {"num_qo_heads": 4, "num_kv_heads": 2, "sliding_window": 13, "num_layers": 3}),
    "qwen3": ("qwen3", {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128}),
    "latents": ("deepseek", {}),
    "latents and experts": ("deepseek", EXPERTS["v3"]),
    "experts": ("shapes", QWEN3_MOE),
    "experts, a part of each head turned": ("shapes", GLM_4),
    "layers that turn nothing": ("shapes", SMOLLM_3),
    "sinks": ("shapes", GPT_OSS),
    "capped scores": ("shapes", GEMMA_2),
    "latents, heads that fill no tile": ("deepseek", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    "latents, queries at once": ("deepseek", {"q_lora_rank": None, "num_attention_heads": 2, "num_key_value_heads": 2}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (family, fields) in VARIANTS.items():
        if family == "deepseek":
            write_for_cuda(root / name, **fields)
            continue
        if family == "shapes":
            write_by_shapes(root / name, fields)
            continue
        shape = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "dtype": "bfloat16"} | fields
        write_checkpoint(root / name, family, tokenizer=False, **shape)  # type: ignore[arg-type]
    return root


variant = each_of(VARIANTS)


@pytest.fixture(scope="module")
def captured(checkpoints: Path, variant: str) -> Engine:
    """A variant's engine with its graphs, which take longer to capture than a test takes with them."""
    return _engine(checkpoints / variant)


@pytest.fixture(scope="module")
def llama(checkpoints: Path) -> Engine:
    return _engine(checkpoints / "llama")


def _engine(model_dir: Path, **fields: object) -> Engine:
    defaults: dict[str, object] = {"device": "cuda", "max_num_seqs": 8, "max_model_len": 1024}
    return Engine(engine_config(model_dir, **(defaults | fields)), num_blocks=256)


def _greedy(num_tokens: int = NUM_TOKENS, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **fields)  # type: ignore[arg-type]


def _mixed() -> list[SamplingParams]:
    """A batch in which every rule of sampling has a row."""
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return [
        SamplingParams(temperature=0.0, **common),  # type: ignore[arg-type]
        SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),  # the rows behind it move up
        SamplingParams(seed=1, **common),  # type: ignore[arg-type]
        SamplingParams(seed=2, top_p=0.9, temperature=0.8, logprobs=3, **common),  # type: ignore[arg-type]
        SamplingParams(seed=3, top_k=20, min_p=0.02, **common),  # type: ignore[arg-type]
        SamplingParams(seed=4, repetition_penalty=1.2, presence_penalty=0.3, **common),  # type: ignore[arg-type]
        SamplingParams(temperature=0.0, logit_bias={9: 3.0}, min_tokens=8, logprobs=0, **common),  # type: ignore[arg-type]
    ]


def _generate(
    engine: Engine, sampling: list[SamplingParams], before_step: Callable[[], None] = lambda: None
) -> list[list[SampledToken]]:
    driver = Driver(engine)
    seqs = [driver.add(prompt, s) for prompt, s in zip(prompts(LENGTHS), sampling, strict=False)]
    tokens: dict[int, list[SampledToken]] = {id(seq): [] for seq in seqs}
    while running := [seq for seq in seqs if seq.num_output_tokens < seq.sampling.max_tokens]:
        before_step()
        for seq, new in zip(running, driver.step([(seq, seq.num_uncomputed_tokens) for seq in running]), strict=True):
            tokens[id(seq)] += new
    return [tokens[id(seq)] for seq in seqs]


def _ids(answers: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]


def test_graphs_yield_the_tokens_of_kernels_launched_one_by_one(
    checkpoints: Path, variant: str, captured: Engine
) -> None:
    launched = _engine(checkpoints / variant, enforce_eager=True)
    assert _ids(_generate(captured, _mixed())) == _ids(_generate(launched, _mixed()))


def test_greedy_tokens_are_those_of_the_cpu_where_they_are_sure(
    checkpoints: Path, variant: str, captured: Engine
) -> None:
    sampling = [_greedy(logprobs=2)] * 7
    on_gpu = _generate(captured, sampling)
    on_cpu = _generate(_engine(checkpoints / variant, device="cpu", dtype="float32"), sampling)
    compared = 0
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        for token, expected in zip(ours, theirs, strict=True):
            if expected.top[0][1] - expected.top[1][1] < SURE_GAP:
                break
            assert token.token_id == expected.token_id
            compared += 1
    assert compared > 2 * 7, "the checkpoint leaves too little to compare"


def test_smaller_latents_whose_queries_grow_are_rounded_as_on_the_cpu(tmp_path: Path) -> None:
    fields: dict[str, Any] = EXPERTS["mistral4"] | {"hidden_size": 128, "kv_lora_rank": 256, "qk_rope_head_dim": 64}
    write_deepseek(tmp_path, "mistral4", dtype=torch.bfloat16, **fields)
    [prompt] = prompts([150])
    cpu = Engine(engine_config(tmp_path, dtype="bfloat16"), num_blocks=64, native=False)
    wanted = prompt_logprobs(_engine(tmp_path, device="cpu", dtype="float32"), prompt)
    on_cpu, on_gpu = (prompt_logprobs(engine, prompt) for engine in (cpu, _engine(tmp_path)))
    # How much a processor's own products in bfloat16 round is its kind's: 0.15 with AVX2, 0.20 with AVX-512.
    assert (on_gpu - wanted).abs().median() < 1.3 * (on_cpu - wanted).abs().median() < 0.4
    captured, launched = _engine(tmp_path), _engine(tmp_path, enforce_eager=True)
    assert _ids(_generate(captured, _mixed())) == _ids(_generate(launched, _mixed()))


def test_steps_prepared_ahead_yield_what_others_do(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "llama")
    assert isinstance(engine.runner, CudaRunner)
    runner = engine.runner.decode_pipeline
    assert runner is not None
    ahead = _generate(engine, _mixed())
    # One step does not fit: rows of one token are sorted to the front, but the order of joining stays.
    assert runner.num_forecasts >= runner.num_steps - 2 > NUM_TOKENS // 2

    def forget() -> None:
        runner._forecast = None

    num_forecasts = runner.num_forecasts
    assert _generate(engine, _mixed(), forget) == ahead
    assert runner.num_forecasts == num_forecasts


def test_batches_of_all_sizes_go_through_their_graphs(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "llama", max_num_seqs=11)
    (alone,) = _generate(engine, [_greedy(8)])
    for count in range(2, 12):
        driver = Driver(engine)
        seqs = [driver.add(prompts([5])[0], _greedy(8)) for _ in range(count)]
        answers = driver.generate(seqs)
        assert answers == [[token.token_id for token in alone]] * count


def test_padding_rows_write_to_the_spare_block_alone(llama: Engine) -> None:
    llama.kv_pages.zero_()  # another test's numbers may be those that are written
    driver = Driver(llama)
    seqs = [driver.add(prompt, _greedy()) for prompt in prompts([5, 20, 9])]  # padded to 4 rows
    driver.step([(seq, seq.num_tokens) for seq in seqs])
    before = llama.kv_pages.clone()
    driver.step([(seq, 1) for seq in seqs])
    changed = (llama.kv_pages != before).any(dim=(0, 2, 3, 5))  # [blocks, block_size]
    places = {(int(block), int(slot)) for block, slot in changed.nonzero()}
    expected = {(seq.block_table[-1], (seq.num_computed_tokens - 1) % 16) for seq in seqs}
    assert places - {(llama.num_blocks, 0)} == expected
    assert llama.kv_pages.shape[1] == llama.num_blocks + 1


def test_8_bits_halve_the_pages_and_move_the_answer_little(checkpoints: Path, llama: Engine) -> None:
    wide, narrow = llama, _engine(checkpoints / "llama", kv_cache_dtype="fp8")
    assert narrow.kv_pages.dtype == torch.float8_e4m3fn and narrow.spec.dtype == "float8_e4m3fn"
    assert 2 * narrow.spec.page_bytes() == wide.spec.page_bytes()
    assert narrow.spec.fingerprint != wide.spec.fingerprint
    assert narrow.spec.page_bytes() == narrow.kv_pages[0, 0].numel() * narrow.kv_pages.element_size()
    sampling = [_greedy(6, logprobs=2)] * 5
    for ours, theirs in zip(_generate(narrow, sampling), _generate(wide, sampling), strict=True):
        assert ours[0].logprob == pytest.approx(theirs[0].logprob, abs=0.5)
    launched = _engine(checkpoints / "llama", kv_cache_dtype="fp8", enforce_eager=True)
    assert _ids(_generate(narrow, _mixed())) == _ids(_generate(launched, _mixed()))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)
def test_queries_in_8_bits_move_the_answer_little(checkpoints: Path) -> None:
    sampling = [_greedy(6, logprobs=2)] * 5
    wide, narrow = (
        _generate(_engine(checkpoints / "llama", kv_cache_dtype="fp8", attention_backend=name), sampling)
        for name in ("flashinfer", "flashinfer_fp8")
    )
    assert any(ours[0].logprob != theirs[0].logprob for ours, theirs in zip(narrow, wide, strict=True))
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours[0].logprob == pytest.approx(theirs[0].logprob, abs=0.5)


def test_blocks_in_8_bits_are_copied(checkpoints: Path) -> None:
    from kvferry.kvcache.pages import copy_blocks

    engine = _engine(checkpoints / "llama", kv_cache_dtype="fp8", enforce_eager=True)
    pages = engine.kv_pages.view(torch.uint8)
    pages.copy_(torch.randint(0, 120, pages.shape, dtype=torch.uint8, device="cuda"))
    expected = pages[:, 3].clone()
    copy_blocks(engine.kv_pages, [(3, 7)], len(engine.kv_pages))
    assert torch.equal(pages[:, 7], expected)


def test_pages_of_a_layer_are_there_when_its_fence_has_passed(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "qwen2 window")
    driver = Driver(engine)
    seq: Sequence = driver.add(prompts([600])[0], _greedy())
    events: list[GpuEvent] = []

    def on_layer(layer: int) -> None:
        assert layer == len(events)
        event = engine.layer_event()
        assert event is not None
        events.append(event)

    driver.step([(seq, 600)], on_layer)
    assert len(events) == 3 and all(event.query() for event in events), "a step has ended when its call returns"
    assert bool(engine.kv_pages[:, seq.block_table[:37]].any(-1).all())
    events.clear()
    driver.step([(seq, 1)], on_layer)  # inside a graph: told of after all layers
    assert len(events) == 3 and all(event.query() for event in events)


def test_a_stream_goes_on_the_same_on_another_engine(checkpoints: Path, llama: Engine) -> None:
    """A seeded answer, cut in the middle: the rest is computed from its known tokens elsewhere."""
    sampling = SamplingParams(seed=11, temperature=0.9, top_p=0.9, max_tokens=NUM_TOKENS, ignore_eos=True)
    first, second = Driver(llama), Driver(_engine(checkpoints / "llama"))
    whole = first.add(prompts([40])[0], sampling)
    first.generate([whole])
    resumed = second.add(prompts([40])[0], sampling)
    second.step([(resumed, 40)])
    resumed.token_ids[40:] = whole.token_ids[:50][40:]
    while resumed.num_uncomputed_tokens > 1:  # emitted tokens go one by one, as they did
        resumed.samples = False
        second.step([(resumed, 1)])
    resumed.samples = True
    assert second.generate([resumed]) == [whole.output_token_ids]


def test_experts_count_tokens_and_no_padding(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "experts")
    driver = Driver(engine)
    seqs = [driver.add(prompt, _greedy(4)) for prompt in prompts([5, 20, 9])]  # padded to 128 tokens, then to 4 rows
    driver.generate(seqs)
    num_tokens = sum(seq.num_computed_tokens for seq in seqs)
    engine.runner.wait()  # for the last step's counts
    assert [sum(layer.taken) for layer in engine.expert_loads()] == [3 * num_tokens] * 2


def test_asking_for_experts_counts_waits_for_no_step(checkpoints: Path) -> None:
    """Not for a copy that is still on its way either; of counts that have landed none is lost, or halved."""
    engine = _engine(checkpoints / "experts")
    driver = Driver(engine)
    seq = driver.add(prompts([5])[0], _greedy(8))
    driver.step([(seq, 5)])
    while seq.num_output_tokens < 6:
        num_before = seq.num_computed_tokens
        driver.step([(seq, 1)])
        num_waits = COUNTS["waits"]
        found = [sum(layer.taken) for layer in engine.expert_loads()]
        assert COUNTS["waits"] == num_waits and found in ([3 * num_before] * 2, [3 * seq.num_computed_tokens] * 2)


@pytest.mark.parametrize(("capability", "has_graphs"), [((8, 0), True), ((7, 5), False)])
def test_experts_are_computed_one_by_one_on_old_cards_alone(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_graphs: bool
) -> None:
    grouped = _ids(_generate(_engine(checkpoints / "experts"), [_greedy(6)] * 3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    engine = _engine(checkpoints / "experts")
    assert isinstance(engine.runner, CudaRunner) and (engine.runner.pieces is not None) is has_graphs
    assert [ids[:2] for ids in _ids(_generate(engine, [_greedy(6)] * 3))] == [ids[:2] for ids in grouped]


def test_a_float32_checkpoint_runs_in_16_bits(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "dtype": "float32"}
    write_checkpoint(tmp_path, tokenizer=False, **shape)
    engine = _engine(tmp_path, enforce_eager=True)
    assert engine.spec.dtype == "bfloat16" and engine.kv_pages.dtype == torch.bfloat16
    assert len(_generate(engine, [_greedy(2)])[0]) == 2


def test_what_cannot_run_here_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, tokenizer=False, head_dim=96, dtype="bfloat16")
    monkeypatch.setattr("kvferry.engine.engine.load_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="the model's have 96; use cpu"):
        _engine(tmp_path)
