"""Run `python -m kvferry.engine.follower_process FD`: a tensor-parallel follower's process, as rank 0 starts it."""

import os
import sys

from ..common.imports import kept_imports

if __name__ == "__main__":
    with kept_imports():
        from .follower import main
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # everything is closed: the interpreter would take long to take the libraries apart
