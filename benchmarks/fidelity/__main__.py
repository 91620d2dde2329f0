"""Run `python -m kvferry.benchmarks.fidelity`."""

import sys

from kvferry.benchmarks.fidelity.fidelity import main

if __name__ == "__main__":
    sys.exit(main())
