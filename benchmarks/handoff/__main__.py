"""Run `python -m kvferry.benchmarks.handoff`."""

import signal
import sys

from kvferry.benchmarks.handoff.handoff import main

if __name__ == "__main__":
    # A plain end would leave the decode end running: this one runs every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
