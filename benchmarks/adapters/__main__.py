"""Run `python -m kvferry.benchmarks.adapters`."""

import sys

from kvferry.benchmarks.adapters.adapters import main

if __name__ == "__main__":
    sys.exit(main())
