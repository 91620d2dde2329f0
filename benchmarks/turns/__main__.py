"""Run `python -m kvferry.benchmarks.turns`."""

import sys

from kvferry.benchmarks.turns.turns import main

if __name__ == "__main__":
    sys.exit(main())
