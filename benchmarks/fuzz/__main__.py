"""Run `python -m kvferry.benchmarks.fuzz`."""

import sys

from kvferry.benchmarks.fuzz.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
