"""What a decoder in C++ takes of a machine's memory and threads."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.engine.cpu import build as native
from kvferry.engine.cpu.decoder import NativeDecoder
from kvferry.engine.cpu.packing import Packer
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.default import cache_dir

from ...checkpoints import write_checkpoint
from ...engine_driver import engine_config

_THREADS = 32
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> NativeDecoder:
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 1}
    path = write_checkpoint(tmp_path_factory.mktemp("m") / "wide", "llama", tokenizer=False, dtype="bfloat16", **shape)
    engine = Engine(engine_config(path, dtype="bfloat16"), num_blocks=8)
    assert isinstance(engine.runner, NativeRunner)
    return engine.runner.decoder


def _another(decoder: NativeDecoder, num_threads: int) -> NativeDecoder:
    model, pages, _ = decoder._keep
    return NativeDecoder(model, pages, num_threads=num_threads)


def _kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_threads_that_have_computed_nothing_take_no_memory(decoder: NativeDecoder) -> None:
    """Each has room for a panel: some megabytes of this shape, more on processors with AMX."""
    before = _kib("VmRSS")
    other = _another(decoder, _THREADS)
    taken = _kib("VmRSS") - before
    del other
    assert taken < _THREADS * 1024


def test_threads_that_the_system_refuses_are_told_by_name(decoder: NativeDecoder) -> None:
    """Not by the end of the process: of those that were started all have ended."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    threads = _num_threads()
    resource.setrlimit(resource.RLIMIT_AS, ((_kib("VmSize") + (512 << 10)) << 10, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"^num_threads: the system does not give this process 4000 threads"):
            _another(decoder, 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert _num_threads() == threads


@pytest.mark.skipif(
    not _LARGE_PAGES.exists() or "[never]" in _LARGE_PAGES.read_text(encoding="utf-8"), reason="the kernel has none"
)
def test_weights_are_packed_into_large_pages() -> None:
    """From their first byte on: nobody has to wait for the kernel to collapse smaller ones."""
    packer = Packer(native.load(cache_dir()), torch.bfloat16)
    packed = packer(DenseWeight(torch.zeros(8192, 4096, dtype=torch.bfloat16)))
    [memory] = packed.memory
    assert isinstance(memory, torch.Tensor)
    assert _large_kib(memory.data_ptr() + memory.nbytes // 2) >= memory.nbytes // 1024 // 2


def _large_kib(address: int) -> int:
    """Return how much of the mapping at an address is in large pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")
