"""Run `python -m kvferry.benchmarks.speculation`."""

import sys

from kvferry.benchmarks.speculation.speculation import main

if __name__ == "__main__":
    sys.exit(main())
