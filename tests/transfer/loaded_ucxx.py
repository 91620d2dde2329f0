"""UCXX and its UCX as loaded, like NIXL's (loaded_nixl.py): for forks that make agents of it."""

from __future__ import annotations

import importlib
from contextlib import suppress

from kvferry.transfer.backends.choose import set_ucx_defaults

with suppress(ImportError):  # there is none
    set_ucx_defaults("127.0.0.1")
    importlib.import_module("ucxx._lib.libucxx")
