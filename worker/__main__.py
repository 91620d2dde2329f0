"""Run `python -m kvferry.worker`: a worker process, as a launcher starts it."""

import gc

if __name__ == "__main__":
    gc.disable()  # what imports make stays: to look through it for garbage takes an eighth of a worker's start
    from .process import exit_process, main

    gc.freeze()  # nor need later collections go through it
    gc.enable()
    exit_process(main())
