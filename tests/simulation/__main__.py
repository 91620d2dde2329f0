"""`python -m kvferry.tests.simulation`: one seed with its trace, or as many requests as there is time for."""

from __future__ import annotations

import sys

from .runner import main

sys.exit(main())
