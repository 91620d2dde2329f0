"""A probe is the same of equal weights, another one of others, and leaves no block behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.engine.probe import probe
from kvferry.kvcache.blocks import BlockPool
from kvferry.models.default import cache_dir
from kvferry.models.probes import kept_probes

from ..checkpoints import write_checkpoint
from ..engine_driver import make_engine


@pytest.mark.slow
def test_a_probe_tells_weights_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = write_checkpoint(tmp_path / "model", tokenizer=False)
    (tmp_path / "cache").mkdir()
    make_engine(model_dir)  # if it compiles anything, then where that is kept
    if (libraries := cache_dir() / "native").exists():
        shutil.copytree(libraries, tmp_path / "cache" / "native")
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    found = []
    for quantization in (None, None, "int8", "int4"):
        engine = make_engine(model_dir, quantization=quantization, mixed_quantization=("plain", "int8", "int4"))
        pool = BlockPool(engine.num_blocks, engine.spec.block_size)
        found.append(probe(engine, pool))
        assert pool.num_free_blocks == engine.num_blocks
    plain, again, int8, int4 = found
    assert plain == again and len(plain) == 64
    distances = [sum(abs(a - b) for a, b in zip(plain, other, strict=True)) / 64 for other in (int8, int4)]
    assert 0 < distances[0] < distances[1]
    kept = kept_probes(model_dir, ["plain", "int8", "int4"])
    assert kept == {"plain": plain, "int8": int8, "int4": int4}


def test_weights_that_are_not_in_the_list_are_refused(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path, tokenizer=False)
    with pytest.raises(ConfigError, match=r"the weights are int8, not one of .*plain.*int4"):
        make_engine(model_dir, quantization="int8", mixed_quantization=("plain", "int4"))
