"""Run `python -m kvferry.benchmarks.interference`."""

import sys

from kvferry.benchmarks.interference.interference import main

if __name__ == "__main__":
    sys.exit(main())
