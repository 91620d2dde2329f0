"""A program for a fork server; what importing it did is known by whom it was done."""

import os

IMPORTED_BY = os.getpid()
