"""Run `python -m kvferry.benchmarks.overhead`."""

import sys

from kvferry.benchmarks.overhead.overhead import main

if __name__ == "__main__":
    sys.exit(main())
