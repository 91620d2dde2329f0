"""sglang's router in a virtual environment of its own, so that it can be measured beside kvferry's.

python -m kvferry.benchmarks.peers.sglang_install [--peer-venv DIR]        under a minute and 200 MB
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from kvferry.benchmarks.shared.program import benchmark, parser_of
from kvferry.common.errors import ConfigError
from kvferry.models.default import cache_dir

SGLANG_ROUTER_VERSION = "0.3.2"


def default_venv() -> Path:
    return cache_dir() / "peers" / "sglang-router"


def ensure_sglang_router(venv_dir: Path) -> None:
    """Install whatever is missing. Raises ConfigError with pip's own words when it fails."""
    if not (venv_dir / "bin" / "python").exists():
        venv.create(venv_dir, with_pip=True)
    packages = venv_dir / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if (packages / f"sglang_router-{SGLANG_ROUTER_VERSION}.dist-info").exists():
        return
    command = [str(venv_dir / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command += ["install", f"sglang-router=={SGLANG_ROUTER_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"pip failed in {venv_dir}: {done.stderr.strip()[-500:]}")


@benchmark("peers.sglang_install")
def main(argv: list[str]) -> int:
    parser = parser_of("peers.sglang_install", __doc__)
    parser.add_argument("--peer-venv", type=Path, default=default_venv(), help="(default: %(default)s)")
    flags = parser.parse_args(argv)
    ensure_sglang_router(flags.peer_venv)
    print(f"sglang-router {SGLANG_ROUTER_VERSION} is in {flags.peer_venv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
