"""Matrices in few bits are multiplied by as what they stand for, and stand for what the weights did."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kvferry.engine.cuda import coded
from kvferry.engine.cuda.coded import TILES, CodedWeight, obstacle, product
from kvferry.engine.cuda.codes import Code, Codes
from kvferry.engine.cuda.experts import GroupedExperts
from kvferry.engine.cuda.stacks import CodedStack
from kvferry.engine.engine import Engine
from kvferry.engine.weights.float8 import groups_to_float8
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models import storage
from kvferry.tests.emulation.products import COMPILED, meant_by
from kvferry.tests.emulation.stream import Event

from ...engine_driver import prompt_logprobs, prompts
from ...transformers_checkpoints import SMALL, write_model
from ..test_cuda_states import _config
from .drawn_codes import FORMS, Form, draw

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]")
[PROMPT] = prompts([90])


def _weights(count: int, **form: object) -> list[GroupedWeight]:
    made = torch.randn(count, 48, 128)
    asked = storage.Form(4, 32, has_minima=False)._replace(**form)  # type: ignore[arg-type]
    return [GroupedWeight.quantized(matrix, asked, dtype=torch.bfloat16) for matrix in made]


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({}, Code.INT4),
        ({"has_minima": True}, Code.INT4),
        ({"bits": 8}, Code.INT8),
        ({"bits": 8, "has_minima": True, "group_size": 128}, Code.INT8),
        ({"is_e2m1": True, "group_size": 16}, Code.E2M1),
    ],
)
def test_codes_stand_for_what_weights_did(form: dict[str, object], code: Code) -> None:
    weights = _weights(3, **form)
    expected = torch.stack([weight.dequantized() for weight in weights])
    codes = Codes.of(weights)
    assert codes.code is code and torch.equal(meant_by(codes), expected)
    parts = [weight.numbers.data_ptr() - codes.numbers.data_ptr() for weight in weights]
    assert parts == [i * weights[0].numbers.nbytes for i in range(3)], "nothing is there twice"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which CUDA builds of torch bring")
def test_the_kernel_computes_what_numbers_stand_for() -> None:
    run = [sys.executable, "-m", "kvferry.tests.engine.cuda.interpreted_codes"]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9 forms of 6 of 6 kinds\n"


def test_the_kernel_is_compiled_for_any_number_of_rows() -> None:
    """Triton would compile one more for a number that is 1, and for a multiple of 16."""
    source = ast.parse((Path(coded.__file__).parent / "coded_kernel.py").read_text(encoding="utf-8"))
    [kernel] = [each for each in source.body if isinstance(each, ast.FunctionDef) and each.name == "_multiply"]
    assert ast.unparse(kernel.decorator_list[0]) == "triton.jit(do_not_specialize=['num_rows'])"
    assert "num_rows" in [argument.arg for argument in kernel.args.args]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.code.name} {form.group_size}")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_card_computes_what_numbers_stand_for(form: Form, device: str) -> None:
    torch.manual_seed(0)
    codes, x, order = draw(form, 3, 80), torch.randn(9, form.num_inputs).bfloat16(), torch.tensor([4, 4, 0, 8, 2, 7])
    moved = [None if each is None else each.to(device) for each in (codes.numbers, codes.scales, codes.minima)]
    on_card = Codes(codes.code, *moved)  # type: ignore[arg-type]
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
    found = product(x.to(device), on_card, ends, order.to(device))[:5].float().cpu()
    rows = x.float()
    if on_card.rounds_rows:
        numbers, row_scales = groups_to_float8(x, codes.group_size)
        rows = numbers.float() * row_scales.repeat_interleave(codes.group_size, 1)
    expected = torch.einsum("ri,roi->ro", rows[order[:5]], meant_by(codes)[[0, 0, 2, 2, 2]])
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-8)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_what_it_does_not_take_is_told(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card, weights = torch.device(device), _weights(2)
    assert not obstacle(weights, card)
    assert "forms" in obstacle([*weights, *_weights(1, bits=8)], card)
    assert "groups of 8" in obstacle(_weights(1, group_size=8), card)
    assert "bfloat16" in obstacle([DenseWeight(torch.ones(16, 16))], card)
    weights[0].order = torch.arange(128, dtype=torch.int32)
    assert "act-order" in obstacle(weights, card)
    monkeypatch.setattr("kvferry.engine.weights.grouped.has_triton", lambda: False)
    assert "Triton" in obstacle(_weights(1), card)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_one_matrix_has_a_bias(device: str) -> None:
    [weight] = _weights(1, is_e2m1=True)
    x, bias, matrix = torch.randn(5, 128).bfloat16(), torch.randn(48).bfloat16(), weight.dequantized()
    for name in ("numbers", "scales"):
        setattr(weight, name, getattr(weight, name).to(device))
    found = CodedWeight(weight).product(x.to(device), bias.to(device)).float().cpu()
    torch.testing.assert_close(found, x.float() @ matrix.T + bias.float(), rtol=2e-2, atol=2e-1)


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "hidden_size": 128,
    "head_dim": 64,
}


@flashinfer
@pytest.mark.parametrize("asked", ["int4", "int8"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_experts_in_whole_numbers_are_computed_together(
    tmp_path: Path, asked: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "moe", transformers.Qwen3MoeConfig(**SMALL | EXPERTS), dtype=torch.bfloat16)
    config = _config(path, quantization=asked, dtype="bfloat16", device=device)
    engine = Engine(config, num_blocks=100)
    for block in engine._experts.blocks.values():
        assert isinstance(block.grouped, GroupedExperts) and isinstance(block.grouped._up, CodedStack)
    together = prompt_logprobs(engine, PROMPT)
    monkeypatch.setattr("kvferry.engine.cuda.experts._obstacle", lambda *_: "as asked")
    engine = Engine(config, num_blocks=100)
    assert all(block.grouped is None for block in engine._experts.blocks.values())
    assert float((together - prompt_logprobs(engine, PROMPT)).abs().median()) < 0.05


@flashinfer
@pytest.mark.skipif(
    torch.cuda.Event.__module__ != Event.__module__, reason="the emulated device alone tells what it has compiled"
)
@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("asked", ["int4", "int8"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_no_step_compiles_what_the_warm_up_has_not(
    tmp_path: Path, asked: str, has_adapters: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an older card, which has no other product of plain numbers for experts' adapters."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    path = write_model(tmp_path / "moe", transformers.Qwen3MoeConfig(**SMALL | EXPERTS), dtype=torch.bfloat16)
    loras: dict[str, object] = {"enable_lora": True, "lora_experts": True, "max_loras": 1, "max_lora_rank": 8}
    config = _config(path, quantization=asked, dtype="bfloat16", device=device, **(loras if has_adapters else {}))
    COMPILED.clear()
    engine = Engine(config.model_copy(update={"enforce_eager": True}), num_blocks=100)
    known = set(COMPILED)
    kinds = {kind for kind, _ in known}
    assert known == {(kind, tile) for kind in kinds for tile in TILES}
    assert (Code.PLAIN in {kind[0] for kind in kinds}) == has_adapters and kinds
    for length in (1, 17, 60, 200, 500):
        prompt_logprobs(engine, prompts([length + 1])[0])
    assert known == COMPILED
