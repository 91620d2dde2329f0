"""Run `python -m kvferry.benchmarks.engine`."""

import sys

from kvferry.benchmarks.engine.engine import main

if __name__ == "__main__":
    sys.exit(main())
