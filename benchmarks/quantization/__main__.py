"""Run `python -m kvferry.benchmarks.quantization`."""

import sys

from kvferry.benchmarks.quantization.quantization import main

if __name__ == "__main__":
    sys.exit(main())
