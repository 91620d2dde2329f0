"""Layers of one block each beside what else a model may have: adapters, quantized weights, experts on CUDA's path."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ..engine_driver import GREEDY, Driver, make_engine, prompt_logprobs
from ..quantized import FORMATS, in_format, put_config
from ..transformers_checkpoints import NEMOTRON_H, NEMOTRON_H_MOE, SMALL, write_model
from .test_adapters import assert_adapted_as_merged
from .transformers_reference import reference_logprobs

NARROW = NEMOTRON_H_MOE | {"moe_latent_size": 32}
VARIANTS = {"dense": NEMOTRON_H, "experts": NEMOTRON_H_MOE, "experts of narrower rows": NARROW}
PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        write_model(root / name, transformers.NemotronHConfig(**SMALL | fields))
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_go_beside_every_block(checkpoints: Path, tmp_path: Path, name: str) -> None:
    targets = ("in_proj", "out_proj", "q_proj", "o_proj", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj")
    assert_adapted_as_merged(checkpoints / name, tmp_path, targets, PROMPT)


# What a format leaves out of the layer that attends, by the backbone's names.
LEFT = "backbone.layers.2.mixer"
EXCLUDED: dict[str, dict[str, object]] = {
    "compressed": {"ignore": ["lm_head", f"{LEFT}.q_proj", f"{LEFT}.in_proj", f"re:^{LEFT}.[kvo]", f"re:{LEFT}.out"]},
    "modelopt": {"exclude_modules": ["lm_head", f"{LEFT}*"]},
}


@pytest.mark.parametrize(
    "form", ["compressed fp8 channel", "compressed int4 packed", "gptq 4", "fp8 tensor", "modelopt fp8 tensor"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_quantized_matrices_are_those_that_are_meant(checkpoints: Path, tmp_path: Path, name: str, form: str) -> None:
    excluded = EXCLUDED.get(form.partition(" ")[0], {})
    stored_as = replace(FORMATS[form], config=FORMATS[form].config | excluded)
    plain = (f"{LEFT}.",) if excluded else ()
    stored, meant = in_format(stored_as, load_file(checkpoints / name / "model.safetensors"), plain=plain)
    found = {}
    for kind, tensors in (("quantized", stored), ("plain", meant)):
        shutil.copytree(checkpoints / name, tmp_path / kind)
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        if kind == "quantized":
            put_config(tmp_path / kind, quantization_config=stored_as.config)
        found[kind] = prompt_logprobs(make_engine(tmp_path / kind), PROMPT)
    torch.testing.assert_close(found["quantized"], found["plain"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_layers_that_attend_or_feed_need_no_states(tmp_path: Path, exact: bool) -> None:
    types = ["mlp", "full_attention", "full_attention", "mlp"]
    write_model(tmp_path, transformers.NemotronHConfig(**SMALL | NEMOTRON_H | {"layers_block_type": types}))
    engine = make_engine(tmp_path, deterministic=exact)
    driver, asked = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=20)
    [answer] = driver.generate([driver.add(PROMPT, asked)], chunk=9)
    following = reference_logprobs(tmp_path, (*PROMPT, *answer[:-1]))[len(PROMPT) - 1 :]
    assert engine.model_config.states is None and following.argmax(1).tolist() == answer


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_matrices_are_rounded_at_the_start(checkpoints: Path, name: str, bits: str) -> None:
    plain = make_engine(checkpoints / name, dtype="bfloat16")
    rounded = make_engine(checkpoints / name, dtype="bfloat16", quantization=bits)
    exact, near = prompt_logprobs(plain, PROMPT), prompt_logprobs(rounded, PROMPT)
    assert not torch.equal(exact, near)
    assert (exact - near).abs().median() < {"int8": 0.5, "int4": 3.0}[bits]  # of some 8 on average
