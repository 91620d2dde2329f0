"""Run `python -m kvferry.benchmarks.fleet`."""

import sys

from kvferry.benchmarks.fleet.fleet import main

if __name__ == "__main__":
    sys.exit(main())
