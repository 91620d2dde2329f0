"""Run `python -m kvferry.benchmarks.restart`."""

import sys

from kvferry.benchmarks.restart.restart import main

if __name__ == "__main__":
    sys.exit(main())
