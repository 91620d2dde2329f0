"""From settings to processes, and how they share a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.config import EngineConfig, SpeculativeConfig
from kvferry.common.errors import ConfigError
from kvferry.common.router_config import RouterConfig
from kvferry.launch.children import worker_environment
from kvferry.launch.engine_checks import check_draft_model, check_engine, check_model
from kvferry.launch.host import Gpu, Host
from kvferry.launch.plan import Deployment, fit_to_host, plan
from kvferry.models.config import ModelConfig
from kvferry.models.parts.delta_nets import DeltaNetsConfig
from kvferry.models.parts.expert_plan import ExpertPlan
from kvferry.models.parts.latent import LatentConfig
from kvferry.models.parts.rope import RopeConfig
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings
from kvferry.sizing.memory import cache_token_bytes, gpu_reserve_bytes, weight_bytes
from kvferry.sizing.weights import lacks_native

from ..checkpoints import write_checkpoint
from ..sizing.models import model_of

GIB = 1 << 30
MODEL = ModelConfig(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    num_qo_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_model_len=8192,
    rope=RopeConfig(),
    rms_norm_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    sliding_windows=(None,) * 32,
    eos_token_ids=frozenset({2}),
    dtype="bfloat16",
)


def planned(prefill: int = 1, decode: int = 1, **settings: object) -> Deployment:
    pools = {"prefill": PoolSettings(workers=prefill), "decode": PoolSettings(workers=decode)}
    return plan(ServeSettings.model_validate({**pools, **settings}), Path("/models/llama"), "llama")


def host(num_gpus: int = 0, *, num_cpus: int = 8, free_gib: float = 64) -> Host:
    gpus = tuple(Gpu(str(index), "H200", 140 * GIB, 139 * GIB) for index in range(num_gpus))
    return Host(num_cpus, int(free_gib * GIB), gpus)


def test_workers_are_named_by_role_and_number() -> None:
    ids = [worker.config.worker_id for worker in planned(2, 1).workers]
    assert ids == ["p-0", "p-1", "d-0"]


def test_pool_overrides_reach_its_workers_alone() -> None:
    settings = ServeSettings(max_num_seqs=32, decode=PoolSettings(max_num_seqs=256))
    prefill, decode = plan(settings, Path("/m"), "m").workers
    assert (prefill.config.engine.max_num_seqs, decode.config.engine.max_num_seqs) == (32, 256)


def test_router_expects_prefill_workers_only_where_there_are_some() -> None:
    assert planned(1).router.expect_prefill
    assert not planned(0).router.expect_prefill


def test_objectives_reach_the_router_and_the_pace_of_answers_every_worker() -> None:
    deployment = planned(
        ttft_objective_ms=900, ttft_stretch=2, tpot_objective_ms=40, classes={"batch": {"priority": 9}}, policy="slo"
    )
    router = deployment.router
    assert (router.ttft_objective_ms, router.ttft_stretch, router.tpot_objective_ms) == (900.0, 2.0, 40.0)
    assert [(known.name, known.priority) for known in router.classes] == [("batch", 9)] and router.policy == "slo"
    assert {worker.config.engine.tpot_objective_ms for worker in deployment.workers} == {40.0}
    assert RouterConfig.model_validate_json(router.model_dump_json()) == router


@pytest.mark.parametrize(("default_ms", "expected_ms"), [(50, 40.0), (None, 40.0), (20, 20.0)])
def test_workers_keep_the_pace_of_the_strictest_class(default_ms: float | None, expected_ms: float) -> None:
    classes = {"interactive": {"tpot_objective_ms": 40}, "slow": {"tpot_objective_ms": 90}, "batch": {"priority": 9}}
    deployment = planned(tpot_objective_ms=default_ms, classes=classes)
    assert deployment.router.tpot_objective_ms == default_ms
    assert {worker.config.engine.tpot_objective_ms for worker in deployment.workers} == {expected_ms}


def test_secret_does_not_show_in_a_deployment() -> None:
    assert "secret" not in repr(planned()).replace("secret_file", "")


@pytest.mark.parametrize(("prefill", "decode", "threads"), [(0, 1, 8), (1, 1, 4), (2, 1, 2), (8, 8, 1)])
def test_cores_are_split_between_workers(prefill: int, decode: int, threads: int) -> None:
    fitted = fit_to_host(planned(prefill, decode), host())
    assert {worker.config.engine.num_threads for worker in fitted.workers} == {threads}
    assert {worker.config.engine.device for worker in fitted.workers} == {"cpu"}


def test_a_worker_may_borrow_all_cores_unless_its_threads_are_set() -> None:
    assert {worker.max_threads for worker in fit_to_host(planned(1, 1), host()).workers} == {8}
    assert {worker.max_threads for worker in fit_to_host(planned(0, 1), host()).workers} == {None}
    fitted = fit_to_host(planned(1, 1, num_threads=3), host())
    assert {(worker.config.engine.num_threads, worker.max_threads) for worker in fitted.workers} == {(3, None)}
    ranks = fit_to_host(planned(0, 1, tensor_parallel_size=2), host(num_cpus=9))
    assert {(worker.config.engine.num_threads, worker.max_threads) for worker in ranks.workers} == {(4, None)}
    on_gpus = fit_to_host(planned(1, 1), host(2))
    assert {(worker.config.niceness, worker.max_threads) for worker in on_gpus.workers} == {(0, None)}


def test_threads_of_workers_on_a_cluster_are_left_to_their_nodes() -> None:
    cluster = replace(host(), is_cluster=True)
    for worker in fit_to_host(planned(1, 1), cluster).workers:
        assert (worker.config.engine.num_threads, worker.max_threads) == (None, None)
    assert fit_to_host(planned(1, 1, num_threads=3), cluster).workers[0].config.engine.num_threads == 3


def test_cpu_cache_is_a_tenth_of_free_memory_up_to_its_bound() -> None:
    for free_gib, expected in ((10, GIB), (640, 2 * GIB)):
        fitted = fit_to_host(planned(), host(free_gib=free_gib))
        assert {worker.config.engine.kv_cache_memory_bytes for worker in fitted.workers} == {expected}
    fitted = fit_to_host(planned(kv_cache_memory_bytes="64MiB"), host())
    assert fitted.workers[0].config.engine.kv_cache_memory_bytes == 64 << 20


def test_caches_of_many_ranks_leave_half_of_the_memory() -> None:
    fitted = fit_to_host(planned(8, 8), host(free_gib=16))
    assert {worker.config.engine.kv_cache_memory_bytes for worker in fitted.workers} == {GIB // 2}


def test_memory_is_shared_with_all_ranks_that_may_come() -> None:
    pools = {"prefill": {"workers": 1, "max_workers": 2}, "decode": {"workers": 1, "max_workers": 3}}
    settings = ServeSettings.model_validate({**pools, "decode": {**pools["decode"], "tensor_parallel_size": 2}})
    deployment = plan(settings, Path("m"), "m")
    assert (deployment.num_ranks, deployment.max_workers, deployment.max_ranks) == (3, 5, 3 + 3 * 2)
    assert Deployment(deployment.router, deployment.workers[:1]).max_ranks == 1, "of a worker that is started by hand"
    fitted = fit_to_host(deployment, host(free_gib=9))
    engines = [worker.config.engine for worker in (*fitted.workers, *fitted.templates)]
    assert [engine.kv_cache_memory_bytes for engine in engines] == [GIB // 2] * 4
    assert [engine.num_threads for engine in engines] == [2] * 4, "of those that are there"


def test_a_pool_may_grow_from_none() -> None:
    def templates(**prefill: int) -> list[str]:
        settings = ServeSettings(prefill=PoolSettings(workers=0, **prefill))
        return [worker.config.role for worker in plan(settings, Path("m"), "m").templates]

    assert templates() == ["decode"] and templates(max_workers=1) == ["prefill", "decode"]


def test_each_router_has_a_control_port_of_its_own() -> None:
    by_hand, router = ServeSettings(control_host="10.0.0.1", control_port=4000), planned().router
    own = plan(by_hand, Path("m"), "m").router
    assert (own.control_host, own.control_port) == (router.control_host, router.control_port)


def test_each_worker_gets_gpus_of_its_own_where_there_are_enough() -> None:
    fitted = fit_to_host(planned(1, 1, tensor_parallel_size=2), host(4), MODEL)
    assert [worker.gpus for worker in fitted.workers] == [("0", "1"), ("2", "3")]
    for worker in fitted.workers:
        engine = worker.config.engine
        assert (engine.device, engine.gpu_memory_utilization, engine.kv_cache_memory_bytes) == ("cuda", 0.9, None)


def test_workers_on_one_gpu_split_its_memory() -> None:
    fitted = fit_to_host(planned(1, 1), host(1), MODEL)
    for worker in fitted.workers:
        engine = worker.config.engine
        assert worker.gpus == ("0",)
        assert worker.gpu_share == 0.5
        assert engine.gpu_memory_utilization == pytest.approx(0.45)
        assert engine.kv_cache_memory_bytes is not None
        assert engine.kv_cache_memory_bytes + weight_bytes(engine, MODEL) < 0.45 * 140 * GIB


def test_gpus_that_are_shared_unevenly_are_split_by_their_sharers() -> None:
    fitted = fit_to_host(planned(2, 1), host(2), MODEL)
    assert [worker.gpus for worker in fitted.workers] == [("0",), ("1",), ("0",)]
    assert [worker.gpu_share for worker in fitted.workers] == [0.5, 1.0, 0.5]


def test_on_a_cluster_workers_of_several_ranks_share_no_gpus() -> None:
    """Half of each of two GPUs is one to Ray: it would give them one GPU."""
    cluster = replace(host(2), is_cluster=True)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: .* these workers need 4 GPUs, and the cluster has 2"):
        fit_to_host(planned(1, 1, tensor_parallel_size=2), cluster, MODEL)
    assert fit_to_host(planned(1, 1, tensor_parallel_size=2), host(2), MODEL).workers[0].gpu_share == 0.5
    assert fit_to_host(planned(0, 1, tensor_parallel_size=2), cluster, MODEL).workers[0].gpu_share == 1.0
    assert fit_to_host(planned(2, 2), cluster, MODEL).workers[0].gpu_share == 0.5


def test_ranks_have_as_much_memory_as_the_one_that_has_the_least() -> None:
    """The first GPU of three is shared by the two workers, the second one is smaller."""
    first, second, third = host(3).gpus
    machine = replace(host(), gpus=(first, replace(second, total_bytes=70 * GIB), third))
    fitted = fit_to_host(planned(1, 1, tensor_parallel_size=2), machine, MODEL)
    assert [(worker.gpus, worker.gpu_share) for worker in fitted.workers] == [(("0", "1"), 0.5), (("2", "0"), 0.5)]
    sizes = [worker.config.engine.kv_cache_memory_bytes or 0 for worker in fitted.workers]
    assert 0 < sizes[0] < 0.45 * 70 * GIB < sizes[1] < 0.45 * 140 * GIB


def test_a_part_of_a_gpu_holds_weights_as_they_are_there() -> None:
    """Those of a checkpoint in 32 bits are read in 16."""
    narrow, wide = (fit_to_host(planned(1, 1), host(1), replace(MODEL, dtype=name)) for name in ("bfloat16", "float32"))
    sizes = [[worker.config.engine.kv_cache_memory_bytes for worker in fitted.workers] for fitted in (narrow, wide)]
    assert sizes[0] == sizes[1]


def test_a_cache_that_is_given_is_not_changed_on_a_part_of_a_gpu() -> None:
    fitted = fit_to_host(planned(1, 1, kv_cache_memory_bytes="1GiB"), host(1), MODEL)
    assert [worker.config.engine.kv_cache_memory_bytes for worker in fitted.workers] == [GIB] * 2
    unknown = replace(host(), gpus=tuple(replace(gpu, total_bytes=0) for gpu in host(1).gpus))
    fitted = fit_to_host(planned(1, 1), unknown, MODEL)
    engines = [worker.config.engine for worker in fitted.workers]
    assert [(engine.kv_cache_memory_bytes, engine.gpu_memory_utilization) for engine in engines] == [(None, 0.45)] * 2


def test_checksums_are_of_pages_in_host_memory() -> None:
    with pytest.raises(ConfigError, match="kv_checksum: on needs KV pages in host memory"):
        fit_to_host(planned(kv_checksum="on"), host(2), MODEL)
    for value, machine in (("auto", host(2)), ("on", host())):
        assert fit_to_host(planned(kv_checksum=value), machine, MODEL).workers[0].config.transfer.kv_checksum == value


def test_too_many_workers_on_one_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold the weights"):
        fit_to_host(planned(8, 8), host(1), MODEL)


def test_too_few_gpus_for_one_worker_names_the_command_that_works() -> None:
    with pytest.raises(
        ConfigError, match="needs 4 GPUs, this host has 3; what works here: kvferry serve /models/llama"
    ) as e:
        fit_to_host(planned(tensor_parallel_size=4), host(3), MODEL)
    assert str(e.value).endswith("--prefill 1 --decode 1 --tensor-parallel-size 2")


def test_the_reserve_follows_the_models_shape_and_the_steps_length() -> None:
    """A 70B's longest prefill step holds some 1.8 GB of activations, an 8B's half of that."""
    engine = planned().workers[0].config.engine
    large = replace(MODEL, num_layers=80, hidden_size=8192, num_qo_heads=64, intermediate_size=28672)
    small, middle, most = (gpu_reserve_bytes(engine, MODEL, tokens) for tokens in (512, 2048, 8192))
    assert 1.5 * GIB < small < middle < most < 2.6 * GIB
    assert 3.2 * GIB < gpu_reserve_bytes(engine, large, 8192) < 3.5 * GIB
    prefill, decode = fit_to_host(planned(1, 1), host(1), MODEL).workers
    sizes = [worker.config.engine.kv_cache_memory_bytes or 0 for worker in (prefill, decode)]
    assert sizes[1] - sizes[0] == most - middle


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_reserve_has_room_for_what_products_of_whole_numbers_make(quantization: str) -> None:
    engines = (planned(quantization=asked).workers[1].config.engine for asked in (None, quantization))
    plain, narrow = (gpu_reserve_bytes(engine, MODEL, 2048) for engine in engines)
    assert narrow - plain == GIB // 2


def test_the_reserve_has_room_for_the_logits_of_drafts_and_for_a_draft_models_workspace() -> None:
    plain = planned(max_num_seqs=64).workers[1].config.engine
    ngram = plain.model_copy(update={"speculative_config": SpeculativeConfig(method="ngram", num_speculative_tokens=3)})
    model = SpeculativeConfig(method="draft_model", model=Path("small"), num_speculative_tokens=3)
    small = plain.model_copy(update={"speculative_config": model})
    reserved = [gpu_reserve_bytes(engine, MODEL, 2048) for engine in (plain, ngram, small)]
    assert reserved[1] - reserved[0] == 4 * 3 * 64 * MODEL.vocab_size * 4
    assert reserved[2] - reserved[1] == GIB // 2
    few = [gpu_reserve_bytes(engine, MODEL, 128) for engine in (plain, ngram)]
    assert few[1] - few[0] == 4 * 64 * MODEL.vocab_size * 4, "a step has no more tokens"


def test_workers_on_gpus_count_them_as_the_driver_does_and_share_memory_with_others() -> None:
    worker = fit_to_host(planned(1, 1), host(2), MODEL).workers[1]
    options = "max_split_size_mb:64, expandable_segments:True,garbage_collection_threshold:0.8"
    env = worker_environment(
        {"PYTORCH_CUDA_ALLOC_CONF": options, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, worker
    )
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64,garbage_collection_threshold:0.8"
    assert "PYTORCH_ALLOC_CONF" not in env
    on_cpu = fit_to_host(planned(1, 1), host(), MODEL).workers[0]
    assert worker_environment({"PYTORCH_CUDA_ALLOC_CONF": options}, on_cpu)["PYTORCH_CUDA_ALLOC_CONF"] == options


def test_queries_in_8_bits_need_keys_in_8_bits() -> None:
    engine = planned(attention_backend="flashinfer_fp8").workers[0].config.engine.model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match="flashinfer_fp8 multiplies by keys in 8 bits: it needs --kv-cache-dtype fp8"):
        check_engine(engine, MODEL)
    check_engine(engine.model_copy(update={"kv_cache_dtype": "fp8"}), MODEL)


@pytest.mark.parametrize(
    ("num_gpus", "capability", "fields", "reason"),
    [
        (0, None, {}, r"only GPUs of capability 9\.0 or more multiply by 8-bit floats; use int8 or int4"),
        (1, (8, 9), {}, r"only GPUs of capability 9\.0"),
        (1, (9, 0), {"dtype": "float32"}, "give --dtype bfloat16"),
        (1, (9, 0), {}, ""),
        (1, (10, 0), {}, ""),
        (1, None, {}, ""),  # the worker looks itself
    ],
)
def test_8_bit_floats_need_a_gpu_that_multiplies_by_them(
    num_gpus: int, capability: tuple[int, int] | None, fields: dict[str, object], reason: str
) -> None:
    gpus = tuple(replace(gpu, capability=capability) for gpu in host(num_gpus).gpus)
    machine = replace(host(), gpus=gpus)
    deployment = planned(0, 1, quantization="fp8", **fields)
    if not reason:
        assert fit_to_host(deployment, machine, MODEL).workers[0].config.engine.quantization == "fp8"
        return
    with pytest.raises(ConfigError, match=reason):
        fit_to_host(deployment, machine, MODEL)


def test_each_gpu_of_a_worker_and_no_other_multiplies_by_8_bit_floats() -> None:
    gpus = [replace(gpu, capability=(9 - number, 0)) for number, gpu in enumerate(host(2).gpus)]
    machine = replace(host(), gpus=tuple(gpus))
    fit_to_host(planned(0, 1, quantization="fp8"), machine, MODEL)
    with pytest.raises(ConfigError, match=r"only GPUs of capability 9\.0"):
        fit_to_host(planned(0, 1, quantization="fp8", tensor_parallel_size=2), machine, MODEL)


def test_a_checkpoint_in_32_bits_is_rounded_to_8_bit_floats_on_a_gpu() -> None:
    """It is read in 16 there, without being asked."""
    model = replace(MODEL, dtype="float32")
    [worker] = fit_to_host(planned(0, 1, quantization="fp8"), host(1), model).workers
    assert worker.config.engine.quantization == "fp8"


def test_latents_that_cuda_has_no_kernels_for_are_refused_before_a_start(tmp_path: Path) -> None:
    engine = EngineConfig(model_dir=tmp_path, served_model_name="m", device="cuda", max_num_batched_tokens=8192)
    latent = LatentConfig(
        q_rank=None,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        bias=False,
        is_interleaved=True,
        score_scale=0.1,
    )
    model = replace(MODEL, latent=latent, num_qo_heads=128)
    check_engine(engine, model)
    for reason, fields, changes in (
        ("512 numbers with 64 .* are 320 . 64", {}, {"latent": replace(latent, kv_rank=320)}),
        ("not 130", {}, {"num_qo_heads": 130}),
        ("possible: 15000", {"max_num_batched_tokens": 1 << 14}, {}),
        ("no kernels here for latents", {"kv_cache_dtype": "fp8"}, {}),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_engine(engine.model_copy(update=fields), replace(model, **changes))


STATES = DeltaNetsConfig(
    layers=(True, True, True, False) * 8,
    num_key_heads=16,
    num_value_heads=32,
    key_dim=128,
    value_dim=128,
    kernel_size=4,
    is_grouped=False,
)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_states_are_served_on_either_device_by_ranks(tmp_path: Path, device: str) -> None:
    engine = EngineConfig.model_validate({"model_dir": tmp_path, "served_model_name": "m", "device": device})
    model = replace(MODEL, states=STATES)
    check_engine(engine, model)
    check_engine(engine.model_copy(update={"kv_cache_dtype": "fp8"}), model)
    check_engine(engine.model_copy(update={"tensor_parallel_size": 2}), model)


def test_ranks_share_states_by_their_heads_of_keys() -> None:
    model = replace(MODEL, num_kv_heads=8, states=replace(STATES, num_key_heads=4).shared_by(8))
    assert model.tp_sizes(whole_experts=False) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"cannot share .*, 4 shares of a state evenly; possible: 1, 2, 4"):
        check_model(planned(tensor_parallel_size=8), model)


def test_exact_steps_of_states_are_for_what_has_cpp(tmp_path: Path) -> None:
    engine = EngineConfig(model_dir=tmp_path, served_model_name="m", device="cpu", deterministic=True)
    model = replace(MODEL, states=STATES)
    check_engine(engine, model)
    odd = replace(MODEL, states=replace(STATES, value_dim=24))
    with pytest.raises(ConfigError, match=r"deterministic: layers that keep a state .* torch: layers that keep such"):
        check_engine(engine, odd)
    check_engine(engine.model_copy(update={"deterministic": False}), odd)
    by_model = SpeculativeConfig(method="draft_model", model=tmp_path)
    with pytest.raises(ConfigError, match=r'states? go with "method": "ngram" or "suffix" alone'):
        check_engine(engine.model_copy(update={"speculative_config": by_model}), model)
    on_gpu = {"device": "cuda", "deterministic": False, "speculative_config": SpeculativeConfig(method="ngram")}
    with pytest.raises(ConfigError, match="keep a state are checked on CPUs alone"):
        check_engine(engine.model_copy(update=on_gpu), model)


def test_the_reserve_has_room_for_states_that_are_computed_with() -> None:
    """Of 8,192 tokens rows twice and what heads yield, and 64 sequences' states of a layer: 2.2 MB each."""
    engine = planned(max_num_seqs=256).workers[0].config.engine
    few, many = (gpu_reserve_bytes(engine, replace(MODEL, states=STATES), n) for n in (16, 8192))
    plain_few, plain_many = (gpu_reserve_bytes(engine, MODEL, n) for n in (16, 8192))
    assert 4 * 64 * STATES.layer_size * 4 < few - plain_few < 0.6 * GIB
    assert 1.5 * GIB < many - plain_many < 2.2 * GIB
    fewer = engine.model_copy(update={"max_num_seqs": 8})
    logits = 4 * (256 - 8) * MODEL.vocab_size * 4
    saved = gpu_reserve_bytes(engine, replace(MODEL, states=STATES), 16) - logits
    assert saved - gpu_reserve_bytes(fewer, replace(MODEL, states=STATES), 16) == 4 * 56 * STATES.layer_size * 4


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cpu works"):
        fit_to_host(planned(device="cuda"), host())


def test_cpu_is_kept_to_on_a_gpu_host_if_asked_for() -> None:
    fitted = fit_to_host(planned(device="cpu"), host(2))
    assert fitted.workers[0].gpus == fitted.gpus == ()


def test_heads_that_cannot_be_shared_are_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"3 prefill ranks .* possible: 1, 2, 4, 8"):
        check_model(planned(tensor_parallel_size=3), MODEL)
    check_model(planned(tensor_parallel_size=8), MODEL)


def test_a_plan_of_experts_is_refused_before_the_start(tmp_path: Path) -> None:
    model = model_of(tmp_path, "30b-a3b")
    (tmp_path / "plan").write_text(ExpertPlan(128, 2).text())

    def of(num_ranks: int) -> Deployment:
        plan = tmp_path / "plan"
        return planned(tensor_parallel_size=num_ranks, enable_expert_parallel=True, expert_plan=plan)

    check_model(of(2), model)
    with pytest.raises(ConfigError, match="is for 2 ranks, tensor_parallel_size is 4"):
        check_model(of(4), model)
    for other in (model, MODEL):
        with pytest.raises(ConfigError, match="expert_plan: needs a mixture of experts, and enable_expert_parallel"):
            check_model(planned(expert_plan=tmp_path / "plan"), other)


def test_an_exchange_is_refused_where_there_is_nothing_to_exchange(tmp_path: Path) -> None:
    model = model_of(tmp_path, "30b-a3b")

    def asked(num_ranks: int = 2, *, whole: bool = True, exchange: str = "all_to_all") -> Deployment:
        return planned(tensor_parallel_size=num_ranks, enable_expert_parallel=whole, expert_exchange=exchange)

    check_model(asked(), model)
    with pytest.raises(ConfigError, match="all_to_all needs enable_expert_parallel"):
        check_model(asked(whole=False), model)
    with pytest.raises(ConfigError, match="needs a tensor_parallel_size above 1"):
        check_model(asked(1), model)
    engines = [asked(exchange=exchange).workers[0].config.engine for exchange in ("sum", "all_to_all")]
    assert [lacks_native(engine, model) for engine in engines] == [[], ["experts whose tokens are exchanged"]]


def test_a_pools_own_plan_is_found_from_any_folder() -> None:
    pool = PoolSettings(tensor_parallel_size=2, enable_expert_parallel=True, expert_plan=Path("plan.json"))
    workers = planned(decode=1).workers, plan(ServeSettings(decode=pool), Path("/models/moe"), "moe").workers
    assert [worker.config.engine.expert_plan for worker in workers[0]] == [None, None]
    assert [worker.config.engine.expert_plan for worker in workers[1]] == [None, Path("plan.json").absolute()]
    assert [worker.config.engine.enable_expert_parallel for worker in workers[1]] == [False, True]


def test_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: 32768 is more than the model's 8192"):
        check_model(planned(max_model_len="32K"), MODEL)


def test_sizes_of_llama_3_8b() -> None:
    engine = planned().workers[0].config.engine
    assert cache_token_bytes(engine, MODEL) == 128 << 10
    assert cache_token_bytes(engine.model_copy(update={"kv_cache_dtype": "fp8"}), MODEL) == 64 << 10
    assert weight_bytes(engine, MODEL) == pytest.approx(8.03e9 * 2, rel=0.01)
    matrices = 6.98e9  # of the layers; embedding and head have 525 million each
    for name, group_bytes in (("int8", 1.0), ("int4", 0.5 + 2 / 128)):
        quantized = engine.model_copy(update={"quantization": name})
        wanted = matrices * group_bytes + 525e6 * (2 + 1)
        assert weight_bytes(quantized, MODEL) == pytest.approx(wanted, rel=0.01)
        two_ranks = quantized.model_copy(update={"tensor_parallel_size": 2})
        assert weight_bytes(two_ranks, MODEL) == pytest.approx(wanted / 2, rel=0.01)
        widened = {"dtype": "float32"}
        plain = engine.model_copy(update=widened)
        assert weight_bytes(quantized.model_copy(update=widened), MODEL) == weight_bytes(plain, MODEL)


def test_steps_are_larger_on_gpus_unless_their_size_is_set() -> None:
    def sizes(host: Host, **settings: object) -> list[int]:
        workers = fit_to_host(planned(1, 1, **settings), host).workers
        return [worker.config.engine.max_num_batched_tokens for worker in workers]

    assert sizes(host()) == [512, 512]
    assert sizes(host(2)) == [8192, 2048]
    assert sizes(host(2), max_num_batched_tokens=512) == [512, 512]
    assert sizes(host(), max_num_seqs=600) == [600, 600]  # each row has a token in a step
    assert sizes(host(2), max_num_seqs=3000) == [8192, 3000]
    assert sizes(host(), max_num_seqs=600, max_num_batched_tokens=900) == [900, 900]


def test_on_shared_cores_every_worker_yields_while_it_decodes_nothing() -> None:
    fitted = fit_to_host(plan(ServeSettings(), Path("model"), "m"), Host(num_cpus=2, free_memory_bytes=8 << 30))
    assert [w.config.niceness > 0 for w in fitted.workers] == [True, True]


def test_a_cache_in_8_bits_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: fp8 needs a GPU"):
        fit_to_host(planned(kv_cache_dtype="fp8"), host())
    with pytest.raises(ConfigError, match="kv_cache_dtype: int8 is read on CPUs alone"):
        fit_to_host(planned(kv_cache_dtype="int8"), host(num_gpus=2))
    fitted = fit_to_host(planned(kv_cache_dtype="fp8"), host(num_gpus=2))
    assert {worker.config.engine.kv_cache_dtype for worker in fitted.workers} == {"fp8"}


def test_deterministic_reaches_every_process_and_needs_cpus() -> None:
    deployment = planned(deterministic=True)
    assert deployment.router.deterministic
    assert all(worker.config.engine.deterministic for worker in fit_to_host(deployment, host()).workers)
    with pytest.raises(ConfigError, match="deterministic: only on CPUs"):
        fit_to_host(deployment, host(num_gpus=2))


def test_deterministic_pools_split_the_model_alike() -> None:
    with pytest.raises(ValueError, match="same tensor_parallel_size, these have 2 and 1"):
        ServeSettings(deterministic=True, prefill=PoolSettings(tensor_parallel_size=2))
    ServeSettings(
        deterministic=True, prefill=PoolSettings(workers=0), decode=PoolSettings(tensor_parallel_size=2)
    )  # one pool


def test_cached_kv_may_go_to_host_memory_and_to_disk_from_every_worker(tmp_path: Path) -> None:
    engines = [worker.config.engine for worker in planned().workers]
    assert [(engine.host_cache_memory_bytes, engine.disk_cache_dir) for engine in engines] == [(None, None)] * 2
    deployment = planned(host_cache_memory_bytes="2GiB", disk_cache_dir=tmp_path, disk_cache_bytes="1GiB")
    for worker in deployment.workers:
        engine = worker.config.engine
        assert (engine.host_cache_memory_bytes, engine.disk_cache_bytes) == (2 * GIB, GIB)
        assert engine.disk_cache_dir == tmp_path
    (home, _) = planned(disk_cache_dir="~/kv").workers
    assert home.config.engine.disk_cache_dir == Path.home() / "kv"


def test_only_decode_workers_have_room_for_preempted_kv() -> None:
    by_default = [worker.config.engine.swap_space for worker in planned().workers]
    assert by_default == [0, None]
    assert [worker.config.engine.swap_space for worker in planned(swap_space="2GiB").workers] == [0, 2 * GIB]
    assert [worker.config.engine.swap_space for worker in planned(swap_space=0).workers] == [0, 0]


def test_drafts_are_for_every_worker_and_make_results_exact() -> None:
    """A prefill worker may decode tomorrow."""
    deployment = planned(speculative_config='{"method": "ngram", "num_speculative_tokens": 3}')
    for worker in deployment.workers:
        engine = worker.config.engine
        assert engine.is_exact_on("cpu") and engine.speculative_config is not None
        assert engine.speculative_config.num_speculative_tokens == 3
    assert deployment.router.deterministic


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_drafts_on_a_gpu_promise_no_bits(device: str) -> None:
    fields: dict[str, Any] = {"speculative_config": {"method": "ngram"}, "device": device}
    deployment = fit_to_host(planned(**fields), host(2))
    assert planned(**fields).router.deterministic is (device == "auto")  # one that is started by hand
    assert not deployment.router.deterministic
    assert not any(worker.config.engine.is_exact_on(worker.config.engine.device) for worker in deployment.workers)
    with pytest.raises(ConfigError, match="deterministic: only on CPUs"):
        fit_to_host(planned(**fields, deterministic=True), host(2))
    ServeSettings.model_validate({"speculative_config": {"method": "ngram"}, "device": "cuda", "deterministic": False})
    ServeSettings.model_validate(
        {"speculative_config": {"method": "ngram"}, "device": "cuda", "prefill": {"tensor_parallel_size": 2}}
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"method": "draft_model"}, "model: method draft_model needs a directory"),
        ({"method": "ngram", "model": "x"}, "model: method ngram has none"),
        ({"method": "ngram", "num_speculative_tokens": 17}, "num_speculative_tokens"),
        ({"method": "ngram", "prompt_lookup_min": 5}, "prompt_lookup_max 4 is below prompt_lookup_min 5"),
        ("[1", "must be a JSON object"),
        ("7", "speculative_config"),
    ],
)
def test_drafts_that_nobody_can_make_are_refused(value: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ServeSettings.model_validate({"speculative_config": value})
    with pytest.raises(ValueError, match="it needs deterministic, which is turned off"):
        ServeSettings.model_validate({"speculative_config": {"method": "ngram"}, "deterministic": False})


def test_a_draft_model_is_named_for_every_worker_and_has_its_part_of_weights_and_blocks(tmp_path: Path) -> None:
    small = write_checkpoint(
        tmp_path / "small", num_layers=3, hidden_size=512, num_kv_heads=1, num_qo_heads=4, head_dim=128, tokenizer=False
    )
    asked = {"method": "draft_model", "model": str(small)}
    engine = planned(speculative_config=asked, dtype="bfloat16").workers[1].config.engine
    alone = planned(dtype="bfloat16").workers[1].config.engine
    assert engine.speculative_config is not None and engine.speculative_config.model == small
    token_bytes = cache_token_bytes(alone, MODEL)
    assert cache_token_bytes(engine, MODEL) == token_bytes + token_bytes // MODEL.num_layers  # all three in one page
    assert weight_bytes(engine, MODEL) > weight_bytes(alone, MODEL)
    two = planned(speculative_config=asked, dtype="bfloat16", tensor_parallel_size=2).workers[1].config.engine
    two_alone = planned(dtype="bfloat16", tensor_parallel_size=2).workers[1].config.engine
    assert cache_token_bytes(two, MODEL) > cache_token_bytes(two_alone, MODEL)
    drafts = [weight_bytes(a, MODEL) - weight_bytes(b, MODEL) for a, b in ((engine, alone), (two, two_alone))]
    assert 0.4 * drafts[0] < drafts[1] < 0.6 * drafts[0]


@pytest.mark.parametrize(
    ("draft_heads", "sizes", "why"),
    [
        (2, (1, 2), ""),
        (2, (4, 4), ""),
        (2, (2, 4), r"not shared alike by workers of 2 and of 4 ranks; give both pools the same tensor_parallel_size"),
        (1, (3, 3), r"the draft model .*: tensor_parallel_size = 3 does not divide the model's num_attention_heads"),
    ],
)
def test_ranks_share_a_draft_model_in_both_pools_alike(
    tmp_path: Path, draft_heads: int, sizes: tuple[int, int], why: str
) -> None:
    draft = write_checkpoint(tmp_path / "draft", num_qo_heads=4, num_kv_heads=draft_heads, head_dim=16, num_layers=8)
    pools = {
        name: PoolSettings(workers=1, tensor_parallel_size=size)
        for name, size in zip(("prefill", "decode"), sizes, strict=True)
    }
    asked = {"method": "draft_model", "model": str(draft)}
    settings = ServeSettings.model_validate({**pools, "device": "cuda", "speculative_config": asked})
    served = write_checkpoint(tmp_path / "served", num_qo_heads=8, num_kv_heads=8, head_dim=32)
    deployment, model = plan(settings, served, "tiny"), ModelConfig.from_dir(served)
    if not why:
        check_draft_model(deployment, model)
        return
    with pytest.raises(ConfigError, match=f"speculative_config: .*{why}"):
        check_draft_model(deployment, model)


# What a launcher uses itself, and what is for a process that is started by hand.
OF_THE_LAUNCHER = {"model", "revision", "routers", "launcher", "ray_address", "pid_file"}
BY_HAND = {"control_host", "control_port", "router", "handoff_host", "handoff_port", "worker_id", "insecure_loopback"}
OTHER_VALUES: dict[str, object] = {
    "dtype": "bfloat16",
    "quantization": "int8",
    "expert_exchange": "all_to_all",
    "mixed_quantization": ["plain"],
    "load_format": "dummy",
    "special_tokens_in_messages": "text",
    "unknown_fields": "warn",
    "tool_call_parser": "hermes",
    "reasoning_parser": "none",
    "allowed_origins": ["https://chat.example"],
    "policy": "round_robin",
    "autoscale": "on",
    "scale_schedule": ["mon-fri 08:00-18:00 prefill>=1"],
    "scale_target": 0.9,
    "classes": ["fast:ttft_objective_ms=200"],
    "device": "cpu",
    "block_size": 32,
    "gpu_memory_utilization": 0.5,
    "kv_cache_dtype": "bfloat16",
    "attention_backend": "cpu",
    "cpu_isa": "avx2",
    "transfer": "ucx",
    "kv_checksum": "off",
    "speculative_config": {"method": "ngram"},
    "lora_modules": ["fr=/adapters/fr"],
    "host_cache_memory_bytes": "7KiB",
    "kv_cache_memory_bytes": "7KiB",
    "swap_space": "7KiB",
    "max_cpu_loras": 9,
    "log_level": "debug",
    "log_format": "json",
    "prefill": {"workers": 2},
    "decode": {"workers": 2},
}


# Others that a setting goes with.
NEEDED: dict[str, dict[str, object]] = {
    "allow_runtime_lora_updating": {"enable_lora": True},
    "lora_experts": {"enable_lora": True},
    "lora_modules": {"enable_lora": True},
}


@pytest.mark.parametrize("name", sorted(ServeSettings.model_fields.keys() - OF_THE_LAUNCHER - BY_HAND))
def test_every_setting_reaches_a_process(name: str) -> None:
    if name == "served_model_name":  # comes resolved
        assert plan(ServeSettings(), Path("/models/m"), "other").router.served_model_name == "other"
        router = plan(ServeSettings(served_model_name=("a", "b", "c")), Path("/models/m"), "a").router
        assert (router.served_model_name, router.model_aliases) == ("a", ("b", "c"))
        return
    default = getattr(ServeSettings(), name)
    other = OTHER_VALUES.get(name, _other(default))
    needed = NEEDED.get(name, {})
    without = ServeSettings.model_validate(needed)
    changed = ServeSettings.model_validate({name: other} | needed)
    assert plan(changed, Path("/models/m"), "m") != plan(without, Path("/models/m"), "m")


@pytest.mark.parametrize("name", ["drain_timeout", "log_format", "log_level", "secret_file"])
def test_what_routers_and_workers_share_reaches_both(name: str) -> None:
    """Files are the same in both, whatever folder they run in."""
    other: dict[str, Any] = {name: OTHER_VALUES.get(name, _other(getattr(ServeSettings(), name)))}
    changed, without = planned(**other), planned()
    for worker, default in zip(changed.workers, without.workers, strict=True):
        assert getattr(worker.config, name) == getattr(changed.router, name) != getattr(default.config, name)


def _other(default: object) -> object:
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if isinstance(default, tuple):
        return ["x"]
    return "x" if isinstance(default, str) else "7"
