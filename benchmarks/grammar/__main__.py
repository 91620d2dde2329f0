"""Run `python -m kvferry.benchmarks.grammar`."""

import sys

from kvferry.benchmarks.grammar.grammar import main

if __name__ == "__main__":
    sys.exit(main())
