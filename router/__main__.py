"""Run `python -m kvferry.router`: the router process, as a launcher starts it."""

from ..common.exits import exit_process
from ..common.imports import ended_by_interrupts, kept_imports

if __name__ == "__main__":
    ended_by_interrupts()
    with kept_imports():
        from .process import main
    exit_process(main())
