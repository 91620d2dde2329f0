"""Run `python -m kvferry.benchmarks.reuse`."""

import sys

from kvferry.benchmarks.reuse.reuse import main

if __name__ == "__main__":
    sys.exit(main())
