"""Run `python -m kvferry.benchmarks.deterministic`."""

import sys

from kvferry.benchmarks.deterministic.deterministic import main

if __name__ == "__main__":
    sys.exit(main())
