"""Run `python -m kvferry.benchmarks.serve`."""

import sys

from kvferry.benchmarks.serve.serve import main

if __name__ == "__main__":
    sys.exit(main())
