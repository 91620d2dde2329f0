"""Run `python -m kvferry.benchmarks.batches`."""

import sys

from kvferry.benchmarks.batches.batches import main

if __name__ == "__main__":
    sys.exit(main())
