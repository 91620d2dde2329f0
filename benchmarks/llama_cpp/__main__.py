"""Run `python -m kvferry.benchmarks.llama_cpp`."""

import sys

from kvferry.benchmarks.llama_cpp.llama_cpp import main

if __name__ == "__main__":
    sys.exit(main())
