"""Every proof that needs a GPU, in one run of less than eight minutes, told and written part by part.

    python benchmarks/gpu_check.py                       # from a checkout, whatever its folder is called
    python -m kvferry.benchmarks.gpu_check --parts kernels,engine --json /tmp/gpu.json

For a bare host: one NVIDIA card with 80 GiB or more, CUDA 13, Python 3.12 and torch 2.11 for CUDA 13, no network, no
Ray. Each part is a program of its own with a time budget; time that a part leaves is the next one's. A part writes what
it found after each of its checks, and all verdicts are written after each part: what is cut says how far it came. A
part whose packages are missing is skipped and says which. Nothing is written without a GPU.

What torch's machine lacks is packed by `benchmarks/gpu/kit.py`, with FlashInfer's modules compiled beforehand, into one
folder of less than 56 MiB: neither FlashInfer's wheel nor NIXL's would fit beside the checkout into 64 MiB, and
compiling takes minutes. Without the kit: the wheels that `gpu/host.py` names, and a whole CUDA toolkit.

Exit code: 0 nothing failed, 1 a part failed or none passed, 2 wrong settings, 3 there is no GPU, or not what this
program itself needs (what is missing is told).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_MISSING_EXIT_CODE = 3


def main(argv: list[str] | None = None) -> int:
    """`gpu_run.main`, where it can be imported."""
    from kvferry.benchmarks.gpu.host import OWN_NEEDS, missing

    if absent := missing(OWN_NEEDS, os.environ):
        print(f"gpu_check itself needs, and does not find: {', '.join(absent)}", file=sys.stderr)
        return _MISSING_EXIT_CODE
    from kvferry.benchmarks.gpu import run as gpu_run

    return gpu_run.main(argv)


def main_from_checkout() -> int:
    """`main` with this checkout as the package: a link has the package's name, whatever the folder is called."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="kvferry-") as links:
        (Path(links) / "kvferry").symlink_to(root)
        sys.path[0] = links  # in place of this folder, whose modules others might import by mistake
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([links, *([inherited] if inherited else [])])
        return main()


if __name__ == "__main__":
    sys.exit(main() if __package__ else main_from_checkout())
