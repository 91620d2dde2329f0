"""Runs a program on the emulated device: `python -m kvferry.tests.emulation -m MODULE ARGUMENT...`."""

from __future__ import annotations

import runpy
import sys

from .install import install


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit(__doc__)
    install()
    module, sys.argv = sys.argv[2], sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
