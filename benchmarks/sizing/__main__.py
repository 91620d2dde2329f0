"""Run `python -m kvferry.benchmarks.sizing`."""

import sys

from kvferry.benchmarks.sizing.sizing import main

if __name__ == "__main__":
    sys.exit(main())
