"""A model directory that declares more positions than its checkpoint was trained for: links and another config.json.

For speed alone. A prompt of 32,000 tokens costs a model of 8,192 positions what it costs any other of its shape, and no
server takes the prompt as long as the config refuses it. What such a model says beyond its positions is worth nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from kvferry.common.errors import ConfigError
from kvferry.models.default import cache_dir

_FIELD = "max_position_embeddings"


def with_positions(model_dir: Path, num_positions: int, into: Path | None = None) -> Path:
    """The directory itself where its positions suffice, else one below `into`, made anew.

    Its place is the same at each call, so that a server which caches by path compiles once.
    """
    try:
        config = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir}: no config.json that can be read: {error}") from error
    if config.get(_FIELD, 0) >= num_positions:
        return model_dir
    target = (into or cache_dir() / "benchmarks") / f"{model_dir.name}-{num_positions}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in model_dir.iterdir():
        os.symlink(file.resolve(), target / file.name)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config | {_FIELD: num_positions}, indent=2) + "\n")
    return target
