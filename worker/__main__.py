"""Run `python -m kvferry.worker`: a worker process, as a launcher starts it."""

from ..common.imports import kept_imports

if __name__ == "__main__":
    with kept_imports():
        from .process import exit_process, main
    exit_process(main())
