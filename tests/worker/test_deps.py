"""What a worker is told of its engine's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.config import EngineConfig
from kvferry.worker.deps import rows_of_a_step


@pytest.mark.parametrize(("num_seqs", "num_tokens", "num_rows"), [(64, 512, 64), (64, 32, 32), (1024, 512, 512)])
def test_a_step_has_no_more_rows_than_tokens(num_seqs: int, num_tokens: int, num_rows: int) -> None:
    config = EngineConfig(
        model_dir=Path("m"), served_model_name="m", max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens
    )
    assert rows_of_a_step(config) == num_rows
