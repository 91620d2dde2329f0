"""Layers that attend beside a state, with what else a model may have: adapters, weights in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from ..engine_driver import Driver, make_engine, prompt_logprobs
from ..transformers_checkpoints import FALCON_H1, SMALL, write_model
from .test_adapters import assert_adapted_as_merged

PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), transformers.FalconH1Config(**SMALL | FALCON_H1))


def test_pages_of_keys_stand_before_those_of_states(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, block_size=16)
    states = engine.model_config.states
    assert states is not None
    page_bytes = 2 * 2 * 16 * 16 * 4
    assert engine.spec.num_layers == 3 + -(-states.num_bytes // page_bytes)
    driver, told = Driver(engine), list[int]()
    driver.step([(driver.add(range(4, 44)), 40)], told.append)
    assert told == list(range(engine.spec.num_layers))


def test_adapters_go_beside_both(checkpoint: Path, tmp_path: Path) -> None:
    targets = ("in_proj", "out_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert_adapted_as_merged(checkpoint, tmp_path, targets, PROMPT)


@pytest.mark.parametrize(("form", "most"), [(None, 0.2), ("int8", 0.5), ("int4", 3.0)])  # of some 8 on average
def test_shorter_numbers_are_near_float32(checkpoint: Path, form: str | None, most: float) -> None:
    exact = prompt_logprobs(make_engine(checkpoint), PROMPT)
    near = prompt_logprobs(make_engine(checkpoint, dtype="bfloat16", quantization=form), PROMPT)
    assert not torch.equal(exact, near) and (exact - near).abs().median() < most
