"""Run `python -m kvferry.worker`: a worker process, as a launcher starts it."""

from .process import exit_process, main

if __name__ == "__main__":
    exit_process(main())
