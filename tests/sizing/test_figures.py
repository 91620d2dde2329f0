"""A worker's figures: known ones of known models, and how they move with what is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.kvcache.frames import frames_of
from kvferry.models.config import ModelConfig
from kvferry.models.quantization import CARD_ROWS
from kvferry.sizing.figures import Sizer
from kvferry.sizing.hardware import GPUS, Gpu, gpu_named, measured_cpu
from kvferry.sizing.memory import pages_spec
from kvferry.sizing.steps import StepWork
from kvferry.sizing.work import exchanged_bytes

from .models import model_of

H100 = gpu_named("H100")


def engine_of(num_ranks: int = 1, **fields: object) -> EngineConfig:
    values = {"model_dir": ".", "served_model_name": "m", "device": "cuda", "max_num_batched_tokens": 8192}
    return EngineConfig.model_validate(values | {"tensor_parallel_size": num_ranks, "max_num_seqs": 256} | fields)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(tmp_path_factory.mktemp("8b"), "8b")


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(tmp_path_factory.mktemp("70b"), "70b")


def test_an_8b_on_one_h100(llama_8b: ModelConfig) -> None:
    """8,030,261,248 parameters (its model card); by hand from the data sheet's 3.35 TB/s and 989.5 TFLOP/s."""
    sizer = Sizer(engine_of(), llama_8b, H100, 2048)
    memory = sizer.memory()
    assert memory.weights == 2 * 8_030_261_248
    assert memory.cache_token == 2 * 32 * 8 * 128 * 2
    assert memory.cache <= 0.9 * 80e9 - memory.weights - memory.workspace < memory.cache + 16 * memory.cache_token
    read = memory.weights - 2 * 128256 * 4096 + 2048 * memory.cache_token  # not the rows that tokens are looked up in
    norms = 2 * 65 * 4096
    assert sizer.decode(1).bound_s == pytest.approx(read / 3.35e12, rel=1e-6)
    products = 2 * (read - 2048 * memory.cache_token - norms) // 2 - 2 * 128256 * 4096  # without the head
    attention = 32 * 4 * 32 * 128 * 2048 * 2049 / 2
    assert sizer.prompt(2048).bound_s == pytest.approx((products * 2048 + attention) / 989.5e12, rel=1e-6)
    assert (sizer.decode(1).binding, sizer.prompt(2048).binding) == ("weights", "products")


def test_a_70b_on_four(llama_70b: ModelConfig) -> None:
    """70,553,706,496 parameters (its model card), 320 KiB of KV for a token; each rank holds the norms whole."""
    sizer = Sizer(engine_of(4), llama_70b, H100, 4096)
    norms = 2 * 161 * 8192
    assert sizer.memory().weights == (2 * 70_553_706_496 - norms) // 4 + norms
    handoff = sizer.handoff(4096, 40e9)
    assert handoff.num_bytes == 4096 * (320 << 10)
    assert handoff.link_s == pytest.approx(handoff.num_bytes / 4 / 40e9)
    assert handoff.exposed_s == pytest.approx(handoff.link_s / 80) and handoff.binding == "compute"
    assert sizer.exchanged_bytes(1) == 161 * 8192 * 2 * 2 * 3 / 4


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_sequence_with_states_takes_whole_blocks(tmp_path: Path, device: str) -> None:
    """Each has a state, so that blocks are long: a short sequence takes a whole one, and a whole one is shipped."""
    model = model_of(tmp_path, "states")
    engine, hardware = engine_of(device=device), H100 if device == "cuda" else measured_cpu(16.0, 300.0, 20.0)
    short, long = (Sizer(engine, model, hardware, context) for context in (100, 2049))
    memory = short.memory()
    assert memory.num_tokens == 2048 * memory.num_blocks
    assert memory.num_contexts == memory.num_blocks == 2 * long.memory().num_contexts
    assert short.handoff(100, 40e9).num_bytes == 2048 * memory.cache_token
    assert short.handoff(2049, 40e9).num_bytes == long.handoff(2049, 40e9).num_bytes == 4096 * memory.cache_token
    assert short.batch(1e3).num_rows == min(256, memory.num_blocks)


def test_the_states_of_a_last_step_cross_when_all_is_computed(tmp_path: Path) -> None:
    """They follow all layers of a step, and those of earlier steps' blocks have crossed meanwhile."""
    model = model_of(tmp_path, "states")
    assert model.states is not None
    sizer = Sizer(engine_of(), model, H100, 1100)
    for num_tokens, num_blocks in ((1100, 1), (8192, 2), (8200, 1)):  # of four blocks the first two are shipped thin
        exposed_s = sizer.handoff(num_tokens, 40e9).exposed_s
        assert exposed_s == pytest.approx(num_blocks * model.states.num_bytes / 40e9), num_tokens


def test_what_no_window_reaches_is_not_shipped(tmp_path: Path) -> None:
    """All 32 layers have a window of 4,096 tokens; a tile and as much before the prompt's end are shipped besides."""
    model = model_of(tmp_path, "8b", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096)
    sizer = Sizer(engine_of(), model, H100, 32_000)
    num_shipped = 32_000 - (32_000 - 256 - 256 - 4095) // 16 * 16
    handoff = sizer.handoff(32_000, 40e9)
    assert handoff.num_bytes == sizer.memory().cache_token * num_shipped
    assert handoff.exposed_s == pytest.approx(handoff.num_bytes / 32 / 40e9)


def test_ranks_have_parts_of_states(tmp_path: Path) -> None:
    """Blocks are as long as on one rank, and as many bytes cross to another worker."""
    # As the one of 9 billion numbers is: of two KV heads a 0.8B's four ranks would have none each.
    sizes = {"hidden_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_value_heads": 32}
    model, cpu = model_of(tmp_path, "states", **sizes), measured_cpu(64.0, 300.0, 20.0)
    alone, *shared = (Sizer(engine_of(size, device="cpu"), model, cpu, 2048) for size in (1, 2, 4))
    for size, sizer in zip((2, 4), shared, strict=True):
        assert sizer.memory().cache_token * size == alone.memory().cache_token
        assert sizer.memory().num_tokens % 2048 == 0
        assert sizer.handoff(2049, 1e9).num_bytes == alone.handoff(2049, 1e9).num_bytes
        assert sizer.shape.read_share == alone.shape.read_share
    with pytest.raises(ConfigError, match="num_key_value_heads = 4"):
        Sizer(engine_of(8, device="cpu"), model, cpu, 2048)


def test_a_norm_over_all_heads_is_one_more_sum(tmp_path: Path) -> None:
    """Of a number of each token: it is counted as a sum, and next to nothing in bytes."""
    fields: dict[str, object] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": ["mamba", "mamba", "attention"],
        "num_hidden_layers": 3,
        "mamba_n_heads": 64,
        "mamba_d_state": 128,
        "shared_intermediate_size": 4096,
        "num_local_experts": 0,
    }
    one, groups = (model_of(tmp_path / str(count), "8b", **fields, mamba_n_groups=count) for count in (1, 8))
    shapes = [
        Sizer(engine_of(2, device="cpu"), model, measured_cpu(64.0, 300.0, 20.0), 128).shape for model in (one, groups)
    ]
    assert shapes[0].num_sums == shapes[1].num_sums + 2 == 2 * 3 + 1 + 2
    assert shapes[0].exchanged_bytes == shapes[1].exchanged_bytes
    olmo = model_of(tmp_path / "olmo", "8b", architectures=["Olmo2ForCausalLM"])  # norms of whole queries and keys
    whole = Sizer(engine_of(2, device="cpu"), olmo, measured_cpu(64.0, 300.0, 20.0), 128).shape
    assert whole.num_sums == (2 + 2) * olmo.num_layers + 1


def test_a_token_uses_a_few_experts(tmp_path: Path) -> None:
    model = model_of(tmp_path, "30b-a3b")
    sizer = Sizer(engine_of(), model, H100, 1024)
    assert sizer.memory().weights == pytest.approx(2 * 30.53e9, rel=0.001)
    assert sizer.shape.active_params + 151936 * 2048 == pytest.approx(3.35e9, rel=0.01)  # and looked-up rows
    alone, many = sizer.decode(1).bound_s, sizer.decode(200).bound_s
    assert alone < 3 * 2 * 3.35e9 / 3.35e12 < many, "all rows together choose nearly all experts"


def test_an_exchange_of_tokens_sends_less_between_many_ranks(tmp_path: Path) -> None:
    """By hand, of 128 experts of which each token takes eight: rows in bfloat16, sums in float32."""
    model = model_of(tmp_path, "30b-a3b")
    whole: dict[str, object] = {"enable_expert_parallel": True}
    summed, exchanged = (
        Sizer(engine_of(4, **whole, expert_exchange=exchange), model, H100, 1024) for exchange in ("sum", "all_to_all")
    )
    attended, by_sum = 49 * 2048 * 2 * 2 * 3 / 4, 48 * 2048 * 2 * 2 * 3 / 4
    is_there = 1 - math.comb(96, 8) / math.comb(128, 8)  # an expert that a token takes on a rank with a quarter of them
    sent = 48 * 3 / 4 * (is_there * (2048 * (2 + 4) + 8 * 8) + 2048 * 2)
    assert summed.exchanged_bytes(10) == pytest.approx(10 * (attended + by_sum))
    assert exchanged.exchanged_bytes(10) == pytest.approx(10 * (attended + sent))
    assert summed.exchanged_bytes(10) == exchanged.exchanged_bytes(10, "sum")
    assert exchanged.shape.num_sums == summed.shape.num_sums + 48 * 3
    assert exchanged.decode(1).expected_s > summed.decode(1).expected_s, "four collectives for one"
    for item_bytes, least in ((2, 22), (4, 14)):  # ranks from which on it is less
        of_both = [
            [exchanged_bytes(1, num_ranks, item_bytes, model, exchange) for num_ranks in (least - 4, least + 4)]
            for exchange in ("sum", "all_to_all")
        ]
        (few_sum, many_sum), (few, many) = of_both
        assert few > few_sum and many < many_sum


def test_what_binds_changes_with_the_rows(llama_8b: ModelConfig) -> None:
    sizer = Sizer(engine_of(max_num_seqs=4096, kv_cache_dtype="fp8"), llama_8b, gpu_named("H200"), 64)
    assert sizer.decode(1).binding == "weights"
    assert sizer.decode(4096).binding == "products"
    assert Sizer(engine_of(), llama_8b, H100, 8192).batch(10.0).binding == "KV cache"
    assert Sizer(engine_of(), llama_8b, H100, 64).batch(10.0).binding == "max_num_seqs"
    assert Sizer(engine_of(), llama_8b, H100, 1024).batch(0.02).binding == "TPOT objective"
    slow = replace(H100, network_gb_per_s=0.1)
    assert Sizer(engine_of(), llama_8b, slow, 4096).handoff(4096, 0.1e9).binding == "link"


def test_windows_bound_what_attention_reads(tmp_path: Path, llama_8b: ModelConfig) -> None:
    sliding = replace(llama_8b, sliding_windows=(1024,) * llama_8b.num_layers)
    long, short = (Sizer(engine_of(), model, H100, 32_768) for model in (llama_8b, sliding))
    assert short.decode(64).bound_s < long.decode(64).bound_s
    assert short.prompt(32_768).bound_s < long.prompt(32_768).bound_s
    assert short.memory() == long.memory(), "pages are kept, read or not"


def test_what_cannot_be_is_refused(llama_8b: ModelConfig, llama_70b: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="141 GB of weights; 1 x H100 have 80 GB"):
        Sizer(engine_of(), llama_70b, H100, 64)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 3 does not divide"):
        Sizer(engine_of(3), llama_8b, H100, 64)
    with pytest.raises(ConfigError, match="context: 200,000 tokens are more than the model's 131,072"):
        Sizer(engine_of(), llama_8b, H100, 200_000)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    gpu=st.sampled_from([gpu for gpu in GPUS.values() if gpu.memory_gb >= 40]),
    context=st.integers(16, 32_768),
    rows=st.integers(1, CARD_ROWS - 1),  # with more, weights in 4 and 8 bits are widened first
    quantization=st.sampled_from([None, "int8", "int4"]),
)
def test_figures_move_as_they_must(
    llama_8b: ModelConfig, gpu: Gpu, context: int, rows: int, quantization: str | None
) -> None:
    one, two = (Sizer(engine_of(n, quantization=quantization), llama_8b, gpu, context) for n in (1, 2))
    assert two.memory().weights < one.memory().weights and two.memory().num_tokens > one.memory().num_tokens
    assert two.decode(rows).bound_s < one.decode(rows).bound_s
    for sizer in (one, two):
        alone, batch = sizer.decode(rows), sizer.decode(rows + 1)
        assert alone.bound_s < alone.expected_s and batch.expected_s > alone.expected_s
        assert batch.expected_s / (rows + 1) < alone.expected_s / rows, "a fuller step costs each row less"
        longer = Sizer(sizer.engine, llama_8b, gpu, context + 1024)
        assert longer.decode(rows).expected_s > alone.expected_s
        assert longer.prompt(context + 1024).expected_s > sizer.prompt(context).expected_s
        assert longer.memory().num_contexts < sizer.memory().num_contexts
        slow, quick = sizer.batch(0.02), sizer.batch(0.2)
        assert slow.num_rows <= quick.num_rows
    if quantization is not None:
        plain = Sizer(engine_of(), llama_8b, gpu, context)
        assert one.memory().num_tokens > plain.memory().num_tokens
        assert one.decode(rows).bound_s <= plain.decode(rows).bound_s


def test_8_bit_floats_made_at_load_are_counted(llama_8b: ModelConfig) -> None:
    plain, narrow = (Sizer(engine_of(quantization=name), llama_8b, H100, 4096) for name in (None, "fp8"))
    linears = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert plain.memory().weights - narrow.memory().weights == linears - 4 * outputs
    assert narrow.prompt(4096).expected_s < 0.6 * plain.prompt(4096).expected_s
    assert narrow.decode(1).expected_s < 0.7 * plain.decode(1).expected_s
    for gpu in (gpu_named("A100-80GB"), measured_cpu(64, 100, 2)):
        with pytest.raises(ConfigError, match="use int8 or int4"):
            Sizer(engine_of(quantization="fp8", device="cpu" if gpu.is_cpu else "cuda"), llama_8b, gpu, 4096)


def test_4_bits_are_read_for_every_16_rows_and_widened_for_many(llama_8b: ModelConfig) -> None:
    plain, narrow = (Sizer(engine_of(quantization=name), llama_8b, H100, 2048) for name in (None, "int4"))
    assert narrow.memory().weights < 0.4 * plain.memory().weights  # the head and the embedding are plain
    assert narrow.decode(1).expected_s < 0.7 * plain.decode(1).expected_s
    few, more, many = (narrow.steps.terms(StepWork(0, 0, rows, 0)) for rows in (16, 64, CARD_ROWS + 1))
    assert few.weights < more.weights and few.products < 1e-3 < many.products
    assert narrow.decode(CARD_ROWS + 1).expected_s > plain.decode(CARD_ROWS + 1).expected_s


def test_prompts_are_multiplied_in_whole_numbers_of_8_bits_and_decode_steps_read_these(llama_8b: ModelConfig) -> None:
    for name in ("H100", "A100-80GB"):
        plain, narrow = (
            Sizer(engine_of(quantization=asked), llama_8b, gpu_named(name), 4096) for asked in (None, "int8")
        )
        linears = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
        outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
        assert plain.memory().weights - narrow.memory().weights == linears - 4 * outputs
        assert narrow.prompt(4096).expected_s < 0.6 * plain.prompt(4096).expected_s
        assert narrow.decode(1).expected_s < 0.7 * plain.decode(1).expected_s


def test_terms_add_up_to_the_step(llama_8b: ModelConfig) -> None:
    steps = Sizer(engine_of(2), llama_8b, H100, 512).steps
    for work in (StepWork(64, 2048), StepWork(0, 0, 32, 9000), StepWork(128, 8256, 16, 700)):
        assert steps.terms(work).total_s == pytest.approx(steps.step_s(work))


def test_a_cpu_takes_what_was_measured(llama_8b: ModelConfig) -> None:
    cpu = measured_cpu(memory_gb=64, memory_gb_per_s=40, tflops=2)
    sizer = Sizer(engine_of(device="cpu", max_num_batched_tokens=512), llama_8b, cpu, 128)
    memory = sizer.memory()
    read = memory.weights - 2 * 128256 * 4096 + 128 * memory.cache_token
    assert sizer.decode(1).expected_s == sizer.decode(1).bound_s == pytest.approx(read / 40e9, rel=1e-6)
    assert memory.weights + memory.cache <= 64e9


def test_a_decode_worker_holds_what_handoffs_bring(tmp_path: Path) -> None:
    """Of Gemma 4's layers one in six reads all of a prompt; what others do not reach takes no memory."""
    model = model_of(tmp_path, "gemma-4-26b-a4b")
    for context, least in ((600, 1.0), (8000, 3.4), (32_000, 6.4)):
        memory = Sizer(engine_of(), model, H100, context).memory()
        assert memory.num_contexts >= least * memory.num_own_contexts
        assert memory.num_own_contexts == memory.num_blocks / -(-context // 16)
    spec = pages_spec(engine_of(), model)
    assert frames_of(spec).num_shares == spec.num_layers // sum(not spec.is_windowed(n) for n in range(spec.num_layers))
