"""Run `python -m kvferry.benchmarks.goodput`."""

import sys

from kvferry.benchmarks.goodput.goodput import main

if __name__ == "__main__":
    sys.exit(main())
