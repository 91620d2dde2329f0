"""What a start chooses of what there is, and how it tells what cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.engine.choose import choose_device
from kvferry.engine.cpu.blocks import known_blocks
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.nn.adapters import AdapterSlots
from kvferry.engine.nn.feed_forward import PlainMLP
from kvferry.engine.nn.mixer import Attention

from ..engine_driver import engine_config


@pytest.mark.parametrize(
    ("device", "is_exact", "num_cards", "rank", "expected"),
    [
        ("cpu", False, 2, 1, "cpu"),
        ("cpu", True, 2, 0, "cpu"),
        ("auto", True, 0, 1, "cpu"),
        ("auto", False, 2, 1, "cuda:1"),
        ("cuda", False, 1, 0, "cuda:0"),
        ("cuda", False, 0, 0, "finds no CUDA device; use --device cpu"),
        ("auto", False, 2, 2, "rank 2 has no device: torch sees 2 CUDA devices"),
        ("auto", True, 1, 0, "deterministic"),
        ("cuda", True, 0, 0, "deterministic"),
    ],
)
def test_a_rank_computes_on_a_card_of_its_own_or_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, is_exact: bool, num_cards: int, rank: int, expected: str
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    config = engine_config(Path("m"), device=device, deterministic=is_exact)
    if expected.startswith(("cpu", "cuda")):
        assert str(choose_device(config, rank)) == expected
        assert list(map(str, chosen)) == [expected] * expected.startswith("cuda")
    else:
        with pytest.raises(ConfigError, match=expected):
            choose_device(config, rank)
        assert not chosen


def test_feed_forwards_need_a_mixer_before_each_in_native_code() -> None:
    attention, mlp = object.__new__(Attention), object.__new__(PlainMLP)
    apart: list[Any] = [
        SimpleNamespace(mixer=attention, feed_forward=None, beside=None),
        SimpleNamespace(mixer=None, feed_forward=mlp, beside=None),
    ]
    [block] = known_blocks(apart)
    assert (block.attention, block.feed_forward, block.layers, block.number) == (attention, mlp, tuple(apart), 0)
    for layers in (apart[1:], [*apart, apart[1]]):
        with pytest.raises(NativeUnavailable, match="without a mixer before each"):
            known_blocks(layers)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_adapters_that_do_not_fit_are_told(error: type[Exception]) -> None:
    linear: Any = SimpleNamespace(takes_some_rows=False, parts_of_rank=lambda: iter([1]))

    def make(*_: object, **__: object) -> Any:
        raise error("no room")

    model: Any = SimpleNamespace(linears=lambda: [linear])
    with pytest.raises(ConfigError, match="3 adapters of rank 16 do not fit: no room"):
        AdapterSlots(model, num_slots=3, max_rank=16, device=torch.device("cpu"), make=make)
