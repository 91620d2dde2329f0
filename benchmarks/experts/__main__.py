"""Run `python -m kvferry.benchmarks.experts`."""

import sys

from kvferry.benchmarks.experts.experts import main

if __name__ == "__main__":
    sys.exit(main())
