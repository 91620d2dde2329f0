"""Run `python -m kvferry.benchmarks.autoscale`."""

import sys

from kvferry.benchmarks.autoscale.autoscale import main

if __name__ == "__main__":
    sys.exit(main())
