"""Run `python -m kvferry.benchmarks.placement_live`."""

import sys

from kvferry.benchmarks.placement_live.placement_live import main

if __name__ == "__main__":
    sys.exit(main())
