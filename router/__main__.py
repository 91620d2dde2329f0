"""Run `python -m kvferry.router`: the router process, as a launcher starts it."""

import sys

from ..common.imports import ended_by_interrupts, kept_imports

if __name__ == "__main__":
    ended_by_interrupts()
    with kept_imports():
        from .process import main
    sys.exit(main())
