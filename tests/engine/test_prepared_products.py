"""A server meets every number of rows: what is prepared for each must not be kept for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..checkpoints import write_checkpoint

_MAX_GROWTH_MB = 300
# Of its own process: both caches read their bounds at the first product.
_STEPS = """
import sys
from pathlib import Path
import psutil
from kvferry.engine.engine import Engine
from kvferry.tests.engine_driver import Driver, engine_config, prompts

def private_mb():
    return psutil.Process().memory_full_info().uss / 2**20

engine = Engine(engine_config(Path(sys.argv[1]), dtype="float32"), num_blocks=32, native=False)
before = None
for length in range(1, 260):
    driver = Driver(engine)
    driver.step([(driver.add(prompts([length])[0]), length)])
    before = before or private_mb()
print(private_mb() - before)
"""


def test_torchs_prepared_products_are_bounded(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", num_layers=1)
    unset = {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", _STEPS, str(path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    growth_mb = float(done.stdout.split()[-1])
    assert growth_mb < _MAX_GROWTH_MB  # 570 by the bounds of the libraries, on a processor with AVX-512
