"""The engine against transformers and against itself: same tokens, however a step is cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.errors import ConfigError
from kvferry.common.request import SamplingParams, Sequence
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.ranks.group import RankGroup
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig

from ..checkpoints import Family, write_checkpoint
from ..engine_driver import GREEDY, Driver, engine_config, make_engine, prompts
from ..quantized import put_config
from .transformers_reference import greedy_tokens, reference_model

NUM_TOKENS = 8
SURE_GAP = 1e-4  # below it two right implementations may disagree on the best token
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 4.0, 9.0, 20.0],
    "partial_rotary_factor": 0.5,
}
THETA = {"rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[Family, dict[str, object]]] = {
    "llama": ("llama", {"hidden_size": 96, "num_qo_heads": 6, "num_kv_heads": 2}),
    "llama tied": ("llama", {"tie_embeddings": True, "num_layers": 3}),
    "llama3 rope": (
        "llama",
        {
            "config": {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            }
        },
    ),
    "llama linear rope": ("llama", {"config": {"rope_scaling": {"type": "linear", "factor": 4.0}}}),
    "llama biases": ("llama", {"biases": True}),
    "mistral": ("mistral", {}),
    "mistral window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {"tie_embeddings": True}),
    "qwen2 window": ("qwen2", {"sliding_window": 13, "num_layers": 3}),
    "qwen2 yarn": ("qwen2", {"config": {"rope_parameters": YARN | {"rope_theta": 5000.0}}}),
    "qwen2 yarn without a second scale": (
        "qwen2",
        {"config": {"rope_parameters": YARN | {"rope_theta": 5000.0, "mscale": 0.7, "mscale_all_dim": 0}}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "granite": ("granite", {"tie_embeddings": True}),
    "granite4": ("granitemoehybrid", {"tie_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "cohere2": ("cohere2", {"tie_embeddings": True}),
    "cohere2 without a window": ("cohere2", {"config": {"layer_types": ["full_attention"] * 4}}),
    "cohere2, another scale": ("cohere2", {"config": {"logit_scale": 0.25, "sliding_window": 40}}),
    "arcee": ("arcee", {"tie_embeddings": True}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "hunyuan, any length": ("hunyuan_v1_dense", {"config": {"rope_parameters": {"rope_type": "default"} | THETA}}),
    "olmo3": ("olmo3", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "seed-oss": ("seed_oss", {}),
    "ministral3": ("ministral3", {}),
    "ministral3 beside a part that sees": ("mistral3", {}),
    "qwen2 beside a part that sees": ("qwen2_5_vl", {}),
    "qwen3 beside a part that sees": ("qwen3_vl", {"tie_embeddings": True}),
    "qwen3 moe beside a part that sees": ("qwen3_vl_moe", {"tie_embeddings": True}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "ernie4.5": ("ernie4_5", {"tie_embeddings": True}),
    "exaone4": ("exaone4", {}),
    "exaone4 without a window": (
        "exaone4",
        {"config": {"sliding_window": None, "layer_types": ["full_attention"] * 4}},
    ),
    "exaone4 full beside a window": ("exaone4", {"config": {"layer_types": ["full_attention"] * 4}}),
    "cwm": ("cwm", {}),
    "phi3 longrope": ("phi3", {"config": {"original_max_position_embeddings": 2048, "rope_scaling": LONGROPE}}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "gemma3": ("gemma3_text", {"head_dim": 32}),
    "gemma3 beside a part that sees": ("gemma3", {"head_dim": 32, "tie_embeddings": True}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (family, fields) in VARIANTS.items():
        write_checkpoint(root / name, family, tokenizer=False, **fields)  # type: ignore[arg-type]
    return root


def test_stacked_experts_are_read_as_they_were_published(checkpoints: Path, tmp_path: Path) -> None:
    """Qwen3-VL's matrices are transposed on the hub; transformers saves them the other way round."""
    source = checkpoints / "qwen3 moe beside a part that sees"
    tensors = load_file(source / "model.safetensors")
    stacks = {name for name in tensors if ".experts." in name}
    assert len(stacks) == 4 and {tensors[name].shape[1:] for name in stacks} == {(96, 64), (64, 48)}
    published = {name: tensor.mT.contiguous() if name in stacks else tensor for name, tensor in tensors.items()}
    shutil.copytree(source, tmp_path / "model")
    save_file(published, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    check_checkpoint(tmp_path / "model", ModelConfig.from_dir(tmp_path / "model"))
    asked = prompts([1, 17, 70])
    engines = [make_engine(path) for path in (source, tmp_path / "model")]
    expected, found = (driver.generate([driver.add(prompt) for prompt in asked]) for driver in map(Driver, engines))
    assert found == expected


def _assert_as_transformers(model_dir: Path, asked: list[list[int]], answers: list[list[int]]) -> None:
    compared = 0
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        expected = greedy_tokens(model_dir, prompt, answer, SURE_GAP)
        assert answer[: len(expected)] == expected, f"prompt of {len(prompt)} tokens"
        compared += len(expected)
    assert compared > len(asked) * NUM_TOKENS // 2, "the checkpoint leaves too little to compare"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    engine = make_engine(checkpoints / variant)
    asked = prompts([1, 15, 16, 17, 33, 70])
    for chunk in (10**9, 16, 7):
        driver = Driver(engine)
        answers = driver.generate([driver.add(prompt) for prompt in asked], chunk=chunk)
        _assert_as_transformers(checkpoints / variant, asked, answers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["granite", "olmo2", "olmo3", "phi3", "smollm3", "gemma2", "gemma3", "arcee"])
@pytest.mark.parametrize("exact", [False, True])
def test_long_prompts_and_exact_steps_are_those_of_transformers(checkpoints: Path, variant: str, exact: bool) -> None:
    driver = Driver(make_engine(checkpoints / variant, deterministic=exact))
    asked = prompts([33, 600])
    answers = driver.generate([driver.add(prompt) for prompt in asked], chunk=256)
    _assert_as_transformers(checkpoints / variant, asked, answers)


@pytest.mark.parametrize("is_other", [True, False])
def test_a_head_in_the_weights_of_a_model_that_is_told_tied_is_used_as_transformers_does(
    tmp_path: Path, is_other: bool
) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen2", tokenizer=False, tie_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone()
    if is_other:
        head[-200:] = head[-200:].flip(0)
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig.from_dir(path)
    assert config.tie_embeddings is not is_other
    check_checkpoint(path, config)
    driver, asked = Driver(make_engine(path)), prompts([1, 17, 33])
    _assert_as_transformers(path, asked, driver.generate([driver.add(prompt) for prompt in asked]))


def test_a_tied_head_is_the_embedding_where_that_was_left_out(tmp_path: Path) -> None:
    """As safetensors' `save_model` writes it."""
    path = write_checkpoint(tmp_path / "model", "qwen2", tokenizer=False, tie_embeddings=True, dtype="bfloat16")
    driver, asked = Driver(make_engine(path, dtype="float32")), prompts([1, 17, 33])
    expected = driver.generate([driver.add(prompt) for prompt in asked])
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    put_config(path, torch_dtype=None)
    config = ModelConfig.from_dir(path)
    assert config.tie_embeddings and config.dtype == "bfloat16"
    check_checkpoint(path, config)
    driver = Driver(make_engine(path, dtype="float32"))
    assert driver.generate([driver.add(prompt) for prompt in asked]) == expected
    put_config(path, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"1 tensors are missing: model\.embed_tokens\.weight"):
        check_checkpoint(path, ModelConfig.from_dir(path))


def test_long_sequences_turn_by_factors_of_their_own(checkpoints: Path, tmp_path: Path) -> None:
    """Chosen once, by what a worker serves."""
    config: dict[str, object] = {"original_max_position_embeddings": 64, "rope_scaling": LONGROPE}
    path = write_checkpoint(tmp_path / "long", "phi3", tokenizer=False, config=config)
    for length, sizes in ((2048, [65, 130]), (64, [10, 50])):
        driver = Driver(make_engine(path, max_model_len=length))
        asked = prompts(sizes)
        _assert_as_transformers(path, asked, driver.generate([driver.add(prompt) for prompt in asked], chunk=30))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["olmo2", "phi3", "smollm3", "gemma3", "arcee"])
def test_two_ranks_say_what_transformers_says(checkpoints: Path, variant: str) -> None:
    config = engine_config(checkpoints / variant, tensor_parallel_size=2)
    asked = prompts([1, 33, 70])
    group = RankGroup.start(config, num_blocks=64)
    try:
        driver = Driver(Engine(config, tp_size=2, num_blocks=64, group=group))
        answers = driver.generate([driver.add(prompt) for prompt in asked], chunk=20)
    finally:
        group.close()
    _assert_as_transformers(checkpoints / variant, asked, answers)


def test_sequences_joining_at_different_steps_do_not_change_each_other(checkpoints: Path) -> None:
    asked = prompts([5, 40, 23])
    driver = Driver(make_engine(checkpoints / "llama"))
    seqs = [driver.add(prompt) for prompt in asked]
    driver.step([(seqs[0], 5)])
    driver.step([(seqs[0], 1), (seqs[1], 32)])
    driver.step([(seqs[0], 1), (seqs[1], 8), (seqs[2], 9)])
    driver.step([(seqs[0], 1), (seqs[1], 1), (seqs[2], 14)])
    answers = driver.generate(seqs, chunk=1)
    _assert_as_transformers(checkpoints / "llama", asked, answers)


@pytest.mark.parametrize("block_size", [8, 32])
def test_block_size_does_not_change_tokens(checkpoints: Path, block_size: int) -> None:
    asked = prompts([31, 32, 33])
    driver = Driver(make_engine(checkpoints / "mistral window", block_size=block_size))
    answers = driver.generate([driver.add(prompt) for prompt in asked])
    _assert_as_transformers(checkpoints / "mistral window", asked, answers)


def test_bfloat16_follows_float32_closely(checkpoints: Path) -> None:
    (prompt,) = prompts([50])
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)
    values = []
    for dtype in ("float32", "bfloat16"):
        driver = Driver(make_engine(checkpoints / "llama", dtype=dtype))
        ((token,),) = driver.step([(driver.add(prompt, sampling), 50)])
        values.append(token)
    assert values[0].logprob is not None and values[1].logprob is not None
    assert abs(values[0].logprob - values[1].logprob) < 0.3


def test_blocks_are_copied_before_the_step(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "llama")
    driver = Driver(engine)
    first = driver.add(prompts([21])[0])
    driver.step([(first, 21)])
    forked = driver.step_fork(first)
    driver.step([(first, 1)])
    assert forked == first.token_ids[22]


def test_on_layer_sees_each_layer_after_its_pages_are_written(checkpoints: Path) -> None:
    engine = make_engine(checkpoints / "llama tied")
    driver = Driver(engine)
    seq = driver.add(prompts([16])[0])
    driver.grow(seq, 16)
    written: list[tuple[int, list[bool]]] = []

    def on_layer(layer: int) -> None:
        written.append((layer, [bool(page.any()) for page in engine.kv_pages[:, seq.block_table[0]]]))

    driver.step([(seq, 16)], on_layer)
    assert written == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]


def test_pages_of_one_engine_continue_on_another(checkpoints: Path) -> None:
    """What a handoff relies on: the same tokens from copied pages, whatever blocks they lie in."""
    (prompt,) = prompts([37])
    prefill, decode = Driver(make_engine(checkpoints / "qwen3")), Driver(make_engine(checkpoints / "qwen3"))
    source = prefill.add(prompt)
    prefill.step([(source, 37)])
    target = decode.add(prompt)
    target.token_ids.append(source.token_ids[-1])
    decode.grow(target, 1)  # so that block ids differ
    decode._free.reverse()
    decode.grow(target, 38)
    for theirs, ours in zip(source.block_table, target.block_table, strict=False):
        decode.engine.kv_pages[:, ours] = prefill.engine.kv_pages[:, theirs]
    target.num_computed_tokens = 37
    assert prefill.engine.spec.fingerprint == decode.engine.spec.fingerprint
    assert decode.generate([target]) == prefill.generate([source])


def test_each_pending_choice_gets_a_token_of_its_own_draw(checkpoints: Path) -> None:
    driver = Driver(make_engine(checkpoints / "llama"))
    seq = driver.add(prompts([12])[0], SamplingParams(temperature=5.0, seed=3))
    seq.pending_choices = (0, 1, 2, 5)
    ((*tokens,),) = driver.step([(seq, 12)])
    assert len(tokens) == 4 and len({token.token_id for token in tokens}) > 1
    alone = driver.add(prompts([12])[0], SamplingParams(temperature=5.0, seed=3), choice=5)
    assert driver.step([(alone, 12)])[0] == (tokens[3],)


def test_row_that_does_not_sample_yields_nothing(checkpoints: Path) -> None:
    driver = Driver(make_engine(checkpoints / "llama"))
    seq = driver.add(prompts([12])[0])
    seq.samples = False
    assert driver.step([(seq, 12)]) == [()]


def test_prompt_logprobs_do_not_depend_on_chunks(checkpoints: Path) -> None:
    (prompt,) = prompts([90])
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)
    found = []
    for chunk in (90, 13):
        driver = Driver(make_engine(checkpoints / "llama"))
        driver.generate([driver.add(prompt, sampling)], chunk=chunk)
        found.append([entry for output in driver.outputs for entry in output.rows[0].prompt_logprobs])
    with torch.inference_mode():
        expected = reference_model(checkpoints / "llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for entries in found:
        assert [entry.token_id for entry in entries] == prompt[1:]
        for position, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
            assert len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1]


def test_engine_does_not_change_sequences(checkpoints: Path) -> None:
    driver = Driver(make_engine(checkpoints / "llama"))
    seq = driver.add(prompts([12])[0])
    driver.grow(seq, 12)
    before = (list(seq.token_ids), list(seq.block_table), seq.num_computed_tokens)
    driver.engine.step(Batch([BatchRow(seq, 12)]))
    assert (seq.token_ids, seq.block_table, seq.num_computed_tokens) == before


def test_dummy_weights_are_the_same_in_every_process(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", tokenizer=False)
    (tmp_path / "model.safetensors").unlink()
    engines = [make_engine(tmp_path, load_format="dummy", seed=seed) for seed in (7, 7, 8)]
    answers = []
    for engine in engines:
        driver = Driver(engine)
        answers.append(driver.generate([driver.add(prompts([20])[0])]))
    assert answers[0] == answers[1] != answers[2]
    assert engines[0].spec.fingerprint == engines[1].spec.fingerprint != engines[2].spec.fingerprint


def test_length_beyond_the_model_is_refused_unless_rope_scaling_covers_it(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len: 4096 is more than the model.s 2048"):
        Engine(engine_config(checkpoints / "llama", max_model_len=4096), num_blocks=4)
    assert make_engine(checkpoints / "llama linear rope", max_model_len=8192).max_model_len == 8192


def test_cache_too_small_to_serve_says_how_many_bytes_are_needed(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=r"10,000 bytes holds 1 blocks of 8,192 bytes.*131,072"):
        Engine(engine_config(checkpoints / "llama", kv_cache_memory_bytes=10_000))


def test_cache_bytes_decide_the_number_of_blocks(checkpoints: Path) -> None:
    engine = Engine(engine_config(checkpoints / "llama", kv_cache_memory_bytes=1 << 20))
    assert engine.num_blocks == 128
    assert engine.kv_pages.shape == (2, 128, 2, 2, 16, 16)
    assert engine.kv_pages.nbytes == 1 << 20


def test_a_rank_has_the_slots_that_every_rank_has(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees other free memory, and a slot that rank 0 names has to be there on all of them."""

    class OfTwo(Communicator):
        def minimum(self, value: int, device: torch.device) -> int:
            return value - 2  # that the other rank can have

    monkeypatch.setattr("kvferry.engine.engine.Communicator", OfTwo)
    engine = make_engine(checkpoints / "llama", swap_space=7 * 8192, host_cache_memory_bytes=5 * 8192)
    assert (engine.num_blocks, engine.num_swap_blocks, engine.num_host_blocks) == (126, 5, 3)
    assert len(engine.host_slots.slot(7)) == 8192 == engine.host_slots.slot_bytes
    with pytest.raises(IndexError):
        engine.host_slots.slot(8)[0]


def test_flashinfer_on_a_cpu_is_refused(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        make_engine(checkpoints / "llama", attention_backend="flashinfer")


def test_a_sequence_without_enough_blocks_is_a_bug(checkpoints: Path) -> None:
    driver = Driver(make_engine(checkpoints / "llama"))
    seq: Sequence = driver.add(prompts([20])[0], GREEDY)
    seq.block_table = [3]
    with pytest.raises(AssertionError, match="block table"):
        driver.engine.step(Batch([BatchRow(seq, 20)]))


def test_a_decode_row_does_not_feel_its_neighbours(checkpoints: Path) -> None:
    """Alone, with one or with many others of other lengths: the same log-probability."""
    engine = make_engine(checkpoints / "llama", num_blocks=256)
    asked = prompts([50, 3, 200, 90, 51, 49, 16, 17, 400])
    values = []
    for count in (1, 2, 3, len(asked)):
        driver = Driver(engine)
        sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
        seqs = [driver.add(prompt, sampling) for prompt in asked[:count]]
        for seq in seqs:
            driver.step([(seq, seq.num_tokens)])
        ((token,), *_) = driver.step([(seq, 1) for seq in seqs])
        values.append(token)
    for token in values[1:]:
        assert token.token_id == values[0].token_id
        assert token.logprob == pytest.approx(values[0].logprob, abs=1e-6)


def test_half_precision_checkpoints_run_in_bfloat16(tmp_path: Path) -> None:
    engine = make_engine(write_checkpoint(tmp_path, tokenizer=False, dtype="float16"))
    assert engine.spec.dtype == "bfloat16" and engine.kv_pages.dtype == torch.bfloat16


def test_cache_types_that_the_cpu_does_not_attend_in_are_refused(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype = fp8 needs a CUDA device"):
        make_engine(checkpoints / "llama", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype = bfloat16 does not go with a model in torch.float32"):
        make_engine(checkpoints / "llama", kv_cache_dtype="bfloat16")
    assert make_engine(checkpoints / "llama", kv_cache_dtype="bfloat16", dtype="bfloat16").spec.dtype == "bfloat16"
