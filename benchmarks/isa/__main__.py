"""Run `python -m kvferry.benchmarks.isa`."""

import sys

from kvferry.benchmarks.isa.isa import main

if __name__ == "__main__":
    sys.exit(main())
