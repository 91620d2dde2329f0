"""Run `python -m kvferry.benchmarks.roles`."""

import sys

from kvferry.benchmarks.roles.roles import main

if __name__ == "__main__":
    sys.exit(main())
