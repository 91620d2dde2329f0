"""Run `python -m kvferry.engine.follower_process FD`: a tensor-parallel follower's process, as rank 0 starts it."""

import signal
import sys

from ..common.exits import exit_process
from ..common.imports import kept_imports

# What reaches all processes, as of a service manager that stops them: rank 0 drains, with this one, and ends it then.
_OF_RANK_0 = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

if __name__ == "__main__":
    for number in _OF_RANK_0:
        signal.signal(number, signal.SIG_IGN)
    with kept_imports():
        from .follower import main
    exit_process(main(int(sys.argv[1])))
