"""The kit's parts that need no compiler: locked requirements, and what is kept of a wheel."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from kvferry.benchmarks.gpu import kit
from kvferry.benchmarks.gpu.host import WHEELS
from kvferry.benchmarks.gpu.modules import ATTENTION, FUSED, LATENTS, MODULES
from kvferry.common.errors import ConfigError


def test_every_package_is_locked_with_hashes() -> None:
    text = kit.requirements([*kit.CARRIED, *kit._TO_BUILD, kit.FLASHINFER, kit.NIXL, "nvidia-curand"])
    for name in (*kit.CARRIED, *kit._TO_BUILD, kit.FLASHINFER, kit.NIXL):
        assert re.search(rf"^{re.escape(name)}==\S+ .*\\\n    --hash=sha256:", text, re.MULTILINE), name
    with pytest.raises(ConfigError, match="no lock in setup/ has no-such-package"):
        kit.requirements(["numpy", "no-such-package"])


def test_what_parts_need_and_the_host_lacks_is_carried() -> None:
    own = {"numpy", "safetensors", "tokenizers", "pytest", "httpx", "rich", "jinja2", "typer", "uvloop"}
    own |= {"prometheus-client", "PyYAML", "matplotlib", "xxhash"}
    wheels = {re.split("[=( ]", wheel)[0] for wheel in WHEELS.values()}
    assert wheels - own <= {*kit.CARRIED, kit.FLASHINFER, kit.NIXL}


def test_an_archive_holds_what_is_kept_and_what_is_added(tmp_path: Path) -> None:
    wheel, library = tmp_path / "w.whl", tmp_path / "page.so"
    library.write_bytes(b"code")
    with zipfile.ZipFile(wheel, "w") as packed:
        for name in ("flashinfer/__init__.py", "flashinfer/data/csrc/page.cu", "flashinfer/data/csrc/moe/x.cu"):
            packed.writestr(name, name)
    archive, added = tmp_path / "out.tar.xz", "flashinfer/data/aot/page/page.so"
    kit.pack(wheel, archive, lambda name: not kit._NEVER_COMPILED.match(name), {added: library})
    with tarfile.open(archive) as packed_again:
        files = {member.name for member in packed_again if member.isfile()}
    assert files == {"flashinfer/__init__.py", "flashinfer/data/csrc/page.cu", added}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar.xz", "page.so", "w.whl"]


def test_modules_have_names_of_one_kind() -> None:
    assert len(set(MODULES)) == len(MODULES) and set(MODULES) == {*FUSED, *ATTENTION, *LATENTS}
    assert all(re.fullmatch(r"(fa2|fa3|decode)_(64|128|256|512)(_window)?(_cap)?(_fp8)?", name) for name in ATTENTION)


def test_a_launcher_of_the_compiler_is_no_toolkit(tmp_path: Path) -> None:
    home, launcher = tmp_path / "cuda", tmp_path / "bin" / "nvcc"
    for program in (home / "bin" / "nvcc", launcher):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    assert kit.toolkit_home({"PATH": str(launcher.parent), "CUDA_HOME": str(home)}) == home
