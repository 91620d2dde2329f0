"""Run `python -m kvferry.benchmarks.lowload`."""

import sys

from kvferry.benchmarks.lowload.lowload import main

if __name__ == "__main__":
    sys.exit(main())
