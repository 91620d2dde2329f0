"""How far back pages are read, of models whose layers have windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.models.config import ModelConfig
from kvferry.models.parts.page_windows import page_windows

from ..e2e.exactness_models import write_exactness_model

TILE = 256


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ()),
        ("gemma3_text", (19 + TILE, 0, 19 + TILE)),
        ("deepseek_v3", ()),
        ("qwen3_5_text", ()),
    ],
)
def test_pages_are_read_as_far_back_as_their_layers_windows_reach(
    tmp_path: Path, family: str, expected: tuple[int, ...]
) -> None:
    model = ModelConfig.from_dir(write_exactness_model(tmp_path / "model", family).path)
    assert page_windows(model) == expected


@pytest.mark.parametrize("family", ["gemma4", "gemma4_borrowing", "gpt_oss", "llama4"])
def test_a_page_that_a_layer_reads_whole_is_read_whole(tmp_path: Path, family: str) -> None:
    model = ModelConfig.from_dir(write_exactness_model(tmp_path / "model", family).path)
    windows = page_windows(model)
    assert len(windows) == model.num_kv_pages and any(windows) and not all(windows)
    for layer, window in enumerate(model.sliding_windows):
        page = model.page_of(layer) if model.uneven is None else model.uneven.spot(model.uneven.lender(layer)).page
        assert page is not None
        assert (windows[page] == 0) if window is None else windows[page] >= window - 1 + TILE or windows[page] == 0


def test_of_states_the_last_is_read(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_exactness_model(tmp_path / "model", "qwen3_5_text").path)
    assert page_windows(model, 3) == (0,) * model.num_kv_pages + (1, 1, 1)
