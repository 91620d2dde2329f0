"""What config.json and `--quantization` say of a model's weights: read, combined, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.families.table import FAMILIES
from kvferry.models.parts.config_fields import ConfigFields
from kvferry.models.quantization import TIED_HEAD, Quantization, Rule, RuleIndex, chosen_quantization, quantized_at_load
from kvferry.models.quantization_config import read_quantization
from kvferry.models.storage import GGUF_KINDS, Form, Storage

from ..checkpoints import write_checkpoint

GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
AWQ: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 128}
WEIGHTS: dict[str, object] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
MIXED: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
HQQ: dict[str, object] = {"quant_config": {"weight_quant_params": {"nbits": 4}}, "quant_method": "hqq"}
UP = "model.layers.0.mlp.up_proj"


def _compressed(
    layout: str = "pack-quantized", *, targets: Sequence[str] = ("Linear",), **weights: object
) -> dict[str, object]:
    group = {"targets": [*targets], "weights": WEIGHTS | weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def _read(config: dict[str, object]) -> Quantization:
    found = read_quantization(ConfigFields(Path("config.json"), {"quantization_config": config}))
    assert found is not None
    return found


def test_a_checkpoint_without_the_word_is_plain(tmp_path: Path) -> None:
    assert ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False)).quantization is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"bits": 4}, "quant_method None is not supported; these are: awq, compressed-tensors, fp8, gguf, gptq"),
        (HQQ, "^config.json: quantization_config: quant_method 'hqq' is not supported.* serve the model that was"),
        ({"load_in_4bit": True}, "quant_method 'bitsandbytes' is not supported"),
        ({"bits": 4, "group_size": 64}, "quant_method 'mlx' is not supported"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format = True: is not supported"),
        (GPTQ | {"bits": 3}, "bits = 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'.* gptq, gptq_v2"),
        (GPTQ | {"format": "bitblas"}, "format = 'bitblas'.* gptq, gptq_v2"),
        (
            GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"},
            "checkpoint_format = 'gptq': and format = 'gptq_v2'",
        ),
        (GPTQ | {"desc_act": "yes"}, "desc_act = 'yes'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (AWQ | {"version": "gemv"}, "version = 'gemv'"),
        (AWQ | {"format": "gemv"}, "format = 'gemv'.* gemm"),
        (AWQ | {"bits": 8}, "only AWQ with 4 bits"),
        (AWQ | {"zero_point": False}, "zero_point"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "no block"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2': is not supported; these are: e4m3, float8_e4m3fn"),
        (_compressed("mxfp8-quantized"), "mxfp8-quantized.* pack-quantized"),
        (_compressed() | {"format": ["pack-quantized"]}, r"\['pack-quantized'\] is not supported; these are: int-"),
        (_compressed("nvfp4-pack-quantized"), "type = 'int'"),
        (_compressed("nvfp4-pack-quantized", type="float", group_size=32), "group_size = 32.* 16 is read"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size = 32.* 16 is read"),
        (MIXED, "quantized_layers = None: names no module"),
        (MIXED | {"quantized_layers": {UP: {"quant_algo": "NVFP4_AWQ"}}}, "quant_algo = 'NVFP4_AWQ'"),
        (_compressed("int-quantized"), "int of 4 bits"),
        (_compressed(num_bits=2), "num_bits = 2"),
        (_compressed() | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (_compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (_compressed() | {"config_groups": {}}, "names no group"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "names no group"),
        (_compressed(targets=["Embedding"]), "targets = .*: Embedding is not supported; Linear, names and re: are"),
        (
            _compressed("int-quantized", num_bits=8, actorder="group"),
            "actorder = 'group': is read of pack-quantized alone",
        ),
        (_compressed() | {"ignore": ["re:(.*"]}, "no expression"),
        (_compressed() | {"ignore": ["re:(a*)*b"]}, "too intricate"),
        (GPTQ | {"dynamic": {"-:.*.*.*.*.*x": {}}}, "too intricate"),
        ({"quant_method": "gguf", "modules": {"lm_head": "IQ2_XS"}}, "lm_head is 'IQ2_XS'.* Q4_K"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _read(config)


def test_heads_and_excluded_modules_are_plain() -> None:
    for config in (GPTQ, AWQ, _compressed() | {"ignore": ["lm_head"]}):
        found = _read(config)
        assert found.storage("lm_head") is None and found.storage(TIED_HEAD) is None
        assert found.form([UP], 256) is not None
    assert _read(GPTQ | {"lm_head": True}).storage("lm_head") is not None
    assert _read(GPTQ | {"dynamic": {r"-:.*\.mlp\..*": {}}}).storage(UP) is None
    assert (
        _read(AWQ | {"modules_to_not_convert": ["model.layers.1"]}).storage("model.layers.10.mlp.up_proj") is not None
    )
    assert _read(_compressed() | {"ignore": ["re:.*up_proj"]}).storage(UP) is None


@pytest.mark.parametrize(
    ("ignored", "plain"),
    [
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "lm_head"),
        ("language_model.model.layers.0.mlp.up_proj", UP),
        ("model.language_model.layers.0.mlp.up_proj", UP),
        ("re:language_model.*0.mlp.up_proj$", UP),
        ("re:^model.language_model.layers.0.mlp.up_proj", UP),
        ("re:.*lm_head", "lm_head"),
    ],
)
def test_a_language_model_within_a_larger_one_is_named_as_a_part_of_it(ignored: str, plain: str) -> None:
    config = _compressed() | {"ignore": ["vision_tower.layers.0.mlp.up_proj", ignored]}
    raw: dict[str, object] = {"text_config": {"model_type": "mistral"}, "quantization_config": config}
    found = read_quantization(ConfigFields(Path("config.json"), raw))
    assert found is not None
    assert [module for module in ("lm_head", UP) if found.storage(module) is None] == [plain]
    assert found.storage("model.layers.1.mlp.up_proj") is not None


@pytest.mark.parametrize("fmt", ["e4m3", "float8_e4m3fn", "float8_e4m3", None])
def test_8_bit_floats_have_several_names(fmt: str | None) -> None:
    """MiniMax-M2's config.json has that of torch."""
    fp8: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert _read(fp8 | {"fmt": fmt}) == _read(fp8)


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("*.mlp.gate", ["layers.0.mlp.gate"]),
        ("*.gate", ["layers.0.mlp.gate"]),
        ("*.mlp.gate*", ["layers.0.mlp.gate", "layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"]),
        ("*layers.1", ["layers.1.mlp.gate_proj"]),
        ("model.layers.0.mlp.*.up_proj", ["layers.0.mlp.experts.1.up_proj"]),
        ("*layers.1*", ["layers.1.mlp.gate_proj", "layers.10.mlp.up_proj"]),
    ],
)
def test_wildcards_of_model_optimizer_end_with_a_part_of_a_name(pattern: str, plain: list[str]) -> None:
    ends = ("0.mlp.gate", "0.mlp.gate_proj", "0.mlp.experts.1.up_proj", "1.mlp.gate_proj", "10.mlp.up_proj")
    found = _read({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": [pattern]})
    named = [rule for rule in found.rules if rule.target != "Linear"]
    assert [f"layers.{end}" for end in ends if any(rule.names(f"model.layers.{end}") for rule in named)] == plain


def test_gates_of_experts_are_plain_unless_they_are_named() -> None:
    gates = [f"model.layers.3.{gate}" for gate in ("mlp.gate", "block_sparse_moe.gate", "mlp.router")]
    fp8: dict[str, object] = {"quant_method": "fp8"}
    for config in (GPTQ, AWQ, fp8, _compressed()):
        found = _read(config)
        assert not any(found.storage(gate) for gate in gates)
        assert found.storage("model.layers.3.mlp.gate_proj") == found.storage(UP) is not None
    named = _read(GPTQ | {"modules_in_block_to_quantize": [["mlp.gate", "mlp.up_proj"]]})
    assert named.storage("model.layers.3.mlp.gate") is not None


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.experts is not None])
def test_every_familys_gates_are_plain(architecture: str) -> None:
    """Those that choose experts, and that of a shared one, by what the family's traits call them."""
    experts = FAMILIES[architecture].experts
    assert experts is not None
    names = [experts.gate, *([] if experts.shared_gate is None else [experts.shared_gate])]
    modules = [".".join(filter(None, ("model.layers.3", experts.module, name))) for name in names]
    for found in (
        _read(GPTQ),
        _read(AWQ),
        _read({"quant_method": "fp8"}),
        _read(_compressed()),
        quantized_at_load("int4"),
    ):
        assert not any(found.storage(module) for module in modules)
        assert found.storage(f"model.layers.3.{experts.module}.experts.0.{experts.parts[-1]}") is not None


def _groups(*groups: tuple[list[str], int]) -> dict[str, object]:
    """Return groups of compressed-tensors: targets and bits."""
    made = {
        f"group_{i}": {"targets": targets, "weights": WEIGHTS | {"num_bits": bits}}
        for i, (targets, bits) in enumerate(groups)
    }
    return _compressed() | {"config_groups": made, "ignore": ["re:.*o_proj"]}


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_names_go_before_expressions_and_these_before_classes(order: tuple[int, ...]) -> None:
    """Whatever the order of groups in the file, as compressed-tensors and vLLM have it."""
    groups = [(["Linear"], 4), (["re:.*mlp.*"], 8), ([UP, "lm_head"], 4)]
    found = _read(_groups(*(groups[i] for i in order)))
    bits = {module: kept and kept.bits for module in (UP, "lm_head") if (kept := found.storage(module)) is not None}
    assert bits == {UP: 4, "lm_head": 4}
    down, queries = (found.storage(f"model.layers.0.{part}") for part in ("mlp.down_proj", "self_attn.q_proj"))
    assert down is not None and down.bits == 8 and queries is not None and queries.bits == 4
    assert found.storage("model.layers.0.self_attn.o_proj") is None
    assert found.name == "compressed-tensors int4 in groups of 64+int8 in groups of 64"


def test_a_name_tells_of_all_forms() -> None:
    """By it workers tell forms apart."""
    assert _read(_compressed()).name == "compressed-tensors int4 in groups of 64"
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    groups: dict[str, object] = {
        "floats": {"targets": ["re:.*o_proj"], "weights": eight, "format": "float-quantized"},
        "whole": {"targets": ["Linear"], "weights": WEIGHTS},
    }
    assert _read(_compressed() | {"config_groups": groups}).name == "compressed-tensors fp8+int4 in groups of 64"
    layers = {UP: {"quant_algo": "NVFP4"}, "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"}}
    assert _read(MIXED | {"quantized_layers": layers}).name == "modelopt fp8+nvfp4"
    assert _read({"quant_method": "fp8"}).name == "fp8"


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_the_second_version_of_gptq_has_two_names(key: str) -> None:
    second = _read(GPTQ | {key: "gptq_v2"}).storage(UP)
    assert second is not None and not second.one_less
    first = _read(GPTQ | {key: "GPTQ"}).storage(UP)
    assert first is not None and first.one_less
    assert _read(AWQ | {"format": "gemm", "version": "GEMM"}) == _read(AWQ)


@pytest.mark.parametrize(
    ("config", "index"),
    [
        (GPTQ | {"desc_act": True}, "g_idx"),
        (GPTQ | {"desc_act": True, "static_groups": True}, None),  # groups are of neighbours
        (GPTQ | {"desc_act": True, "group_size": -1}, None),  # one group has no order
        (GPTQ | {"desc_act": False}, None),
        (_compressed(actorder="group"), "weight_g_idx"),
        (_compressed(actorder="weight"), None),
        (_compressed(actorder=None), None),
    ],
)
def test_act_order_needs_the_groups_of_inputs(config: dict[str, object], index: str | None) -> None:
    storage = _read(config).storage(UP)
    assert storage is not None
    needed = [name for name in storage.tensors(UP, 512, 256) if name.endswith("g_idx")]
    assert needed == ([] if index is None else [f"{UP}.{index}"])


def test_inputs_that_are_no_whole_groups_are_told_before_shapes() -> None:
    storage = _read(GPTQ).storage(UP)
    assert storage is not None
    with pytest.raises(ConfigError, match=r"up_proj: its 192 inputs are no whole groups of 128"):
        storage.tensors(UP, 512, 192)


def test_the_first_name_of_compressed_tensors_key_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"compression_config": _compressed()}))
    told = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}  # config.json goes first
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": told}))
    assert ModelConfig.from_dir(tmp_path).weights_form == "compressed-tensors int4 in groups of 64"
    (tmp_path / "config.json").write_text(json.dumps(config | {"compression_config": {"quant_method": "sparse"}}))
    with pytest.raises(ConfigError, match="compression_config: quant_method 'sparse' is not supported; these are: awq"):
        ModelConfig.from_dir(tmp_path)


def test_mlx_may_tell_of_itself_in_a_key_of_its_own() -> None:
    raw: dict[str, object] = {"quantization": {"group_size": 64, "bits": 4}}
    with pytest.raises(ConfigError, match="quantization: quant_method 'mlx' is not supported"):
        read_quantization(ConfigFields(Path("config.json"), raw))


@pytest.mark.parametrize("told", ["none", False, {}, {"bits": 16}])
def test_mlxs_key_may_be_of_something_else(told: object) -> None:
    assert read_quantization(ConfigFields(Path("config.json"), {"quantization": told})) is None


def test_a_calibrated_cache_alone_leaves_matrices_plain() -> None:
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert read_quantization(ConfigFields(Path("config.json"), {"quantization_config": config | scheme})) is None


@pytest.mark.parametrize("pattern", ["model.layers.0.", "model.layers.0", "model.layers.*.up_proj", ".up_proj"])
def test_excluded_modules_are_named_as_tools_that_look_for_parts_of_names_do(pattern: str) -> None:
    for config in (AWQ, {"quant_method": "fp8"}):
        found = _read(config | {"modules_to_not_convert": [pattern]})
        assert found.storage(UP) is None and found.storage("model.layers.1.mlp.down_proj") is not None


def test_fused_parts_take_the_form_that_holds_each_exactly() -> None:
    kinds = {"q": "Q4_K", "k": "Q4_0", "v": "Q6_K"}
    found = _read({"quant_method": "gguf", "modules": kinds})
    assert found.form(["q"], 256) == GGUF_KINDS["Q4_K"].form
    assert found.form(["q", "k"], 256) == Form(4, 32, has_minima=True)
    assert found.form(["q", "k", "v"], 256) == Form(8, 16, has_minima=True)
    assert found.form(["q", "plain"], 256) is None
    fours = Rule("q", Storage(layout="float4", bits=4, kind="nvfp4"))
    others = Rule("k", Storage(layout="packed", bits=4, group_size=32))
    found = Quantization(name="", method="", rules=(fours, others))
    assert found.form(["q", "q"], 256) == Form(4, 16, has_minima=False, is_e2m1=True)
    assert found.form(["q", "k"], 256) == Form(8, 16, has_minima=False)
    found = _read({"quant_method": "gguf", "modules": kinds})
    with pytest.raises(ConfigError, match="q: its 288 inputs are no whole groups of 256"):
        found.form(["q"], 288)


def test_groups_of_int4_are_the_largest_that_divide() -> None:
    found = quantized_at_load("int4")
    sizes = {inputs: form.group_size for inputs in (4096, 576, 96) if (form := found.form([UP], inputs)) is not None}
    assert sizes == {4096: 128, 576: 64, 96: 32}
    assert found.form(["lm_head"], 576) == found.form([TIED_HEAD], 576) == Form(8, 576, has_minima=False)


def test_8_bit_floats_leave_plain_what_decides_much_or_has_no_product() -> None:
    found = quantized_at_load("fp8")
    plain = ("lm_head", TIED_HEAD, "model.layers.0.mlp.gate")
    assert not any(found.rounds_to_float8([module]) for module in (*plain, "model.layers.0.self_attn.kv_b_proj"))
    assert found.rounds_to_float8([UP, "model.layers.0.mlp.gate_proj"]) and found.form([UP], 4096) is None
    for experts in ("shared_experts", "experts.3"):
        assert found.rounds_to_float8([f"model.layers.3.mlp.{experts}.up_proj"])
    assert found.is_float8 and found.is_rounded_float8 and found.name == "fp8"
    stored = _read({"quant_method": "fp8"})
    assert stored.is_float8 and not stored.is_rounded_float8 and not stored.rounds_to_float8([UP])
    assert chosen_quantization(stored, "fp8") is stored
    assert chosen_quantization(None, "fp8") == found
    stored.check_float8(has_products=False, is_float32=True)
    with pytest.raises(ConfigError, match="use int8 or int4"):
        found.check_float8(has_products=False, is_float32=False)


def test_what_is_asked_for_goes_with_the_checkpoint() -> None:
    stored = _read(GPTQ)
    assert chosen_quantization(stored, None) is stored and chosen_quantization(stored, "gptq") is stored
    assert chosen_quantization(None, None) is None
    with pytest.raises(ConfigError, match="the checkpoint is gptq int4 in groups of 128 already"):
        chosen_quantization(stored, "int8")
    with pytest.raises(ConfigError, match=r"awq: the checkpoint's .* has no such"):
        chosen_quantization(None, "awq")


def test_experts_in_mxfp4_alone_become_floats_of_8_bits() -> None:
    stored = Quantization(name="mxfp4", method="mxfp4", has_mxfp4_experts=True)
    asked = chosen_quantization(stored, "fp8")
    assert asked is not None and asked.name == "fp8" and asked.rounds_experts_of_mxfp4
    assert asked.rounds_to_float8(["model.layers.0.mlp.experts.down_proj"])
    assert asked.storage("model.layers.0.self_attn.q_proj") is None and asked.storage("lm_head") is None
    assert not stored.rounds_experts_of_mxfp4 and not quantized_at_load("fp8").rounds_experts_of_mxfp4
    with pytest.raises(ConfigError, match="only GPUs of capability"):
        asked.check_float8(has_products=False, is_float32=False)
    with pytest.raises(ConfigError, match="quantization = int8: the checkpoint is mxfp4 already"):
        chosen_quantization(stored, "int8")


def test_a_rules_target_is_a_run_of_a_names_parts() -> None:
    plain = Storage(layout="plain")
    assert Rule("mlp.up_proj", plain).names(UP) and Rule(UP, plain).names(UP) and Rule("Linear", plain).names(UP)
    assert not Rule("p.up_proj", plain).names(UP) and not Rule("re:mlp", plain).names(UP)


TARGETS = [
    "re:.*layers.1.mlp.up",
    "mlp.up_proj",
    "model.layers.1",
    "lm_head",
    "Linear",
    UP,
    "layers",
    "re:.*down_proj$",
]


@given(st.permutations(TARGETS))
def test_an_index_finds_the_first_rule_that_names_a_module(targets: list[str]) -> None:
    rules = [Rule(target, Storage(layout="plain")) for target in targets[:5]]
    index = RuleIndex(rules)
    parts = ("mlp.up_proj", "mlp.down_proj", "mlp.gate", "mlp.experts.3.up_proj")
    for module in ("lm_head", "x.up_proj", *(f"model.layers.{layer}.{part}" for layer in (0, 1, 11) for part in parts)):
        assert index.first(module) is next((rule for rule in rules if rule.names(module)), None)


def test_hundreds_of_excluded_modules_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Qwen3-235B-A22B-FP8, which has 36,000 modules: each was tried with each of 283 rules."""
    excluded = [f"model.layers.{layer}.mlp.gate" for layer in range(94)]
    found = _read({"quant_method": "fp8", "modules_to_not_convert": excluded})
    tried: list[str] = []
    names = Rule.names

    def told(rule: Rule, module: str) -> bool:
        tried.append(rule.target)
        return names(rule, module)

    monkeypatch.setattr(Rule, "names", told)
    assert found.storage("model.layers.93.mlp.gate") is None
    assert found.storage("model.layers.93.mlp.experts.127.gate_proj") is not None
    assert tried == ["Linear"]


def test_excluded_modules_with_stars_are_one_rule() -> None:
    """As in Model Optimizer's files, which name the attention of each layer: each module was tried with all."""
    excluded = [
        *(f"model.layers.{layer}.self_attn*" for layer in range(61)),
        "re:.*gate$",
        "lm_head",
        "*.mlp.down_proj",
    ]
    modelopt: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    found = _read(modelopt | {"exclude_modules": excluded})
    assert len(found.rules) == len(["re:.*gate$", "lm_head", "those with stars", "Linear"])
    for plain in ("layers.0.self_attn.q_proj", "layers.60.self_attn.o_proj", "layers.3.mlp.down_proj"):
        assert found.storage(f"model.{plain}") is None
    assert found.storage("model.layers.61.self_attn.q_proj") is not None and found.storage(UP) is not None
    with pytest.raises(ConfigError, match=r"'re:a\.\*b.*too intricate"):
        _read(modelopt | {"exclude_modules": ["a*", "a*b*c*d*e*"]})


def test_model_optimizer_tells_of_8_bit_floats_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    told = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*layers.1.*"]}
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt", "version": "0.29"}, "quantization": told}))
    found = ModelConfig.from_dir(tmp_path).quantization
    assert found is not None and found.name == "modelopt fp8" and found.storage("lm_head") is None
    assert found.storage("model.layers.1.mlp.up_proj") is None
    assert found.storage(UP) == Storage(layout="float8", sharing="tensor")
    assert chosen_quantization(found, "modelopt") is found
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    assert ModelConfig.from_dir(tmp_path).weights_form == "gptq int4 in groups of 128"  # config.json goes first
    beside.write_text(json.dumps({"quantization": told | {"quant_algo": "W8A8_SQ"}}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quant_algo = 'W8A8_SQ': is not supported; these are: FP8, FP8_PER"):
        ModelConfig.from_dir(tmp_path)
