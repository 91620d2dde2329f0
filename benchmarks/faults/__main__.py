"""Run `python -m kvferry.benchmarks.faults`."""

import sys

from kvferry.benchmarks.faults.faults import main

if __name__ == "__main__":
    sys.exit(main())
