"""NIXL and its UCX as loaded: import this before a fork that makes agents of NIXL. None is made here, nothing opened.

UCX redirects the C library's calls for memory while it is loaded, and waits 5 ms at each of them for other threads to
leave it: up to 0.4 s of a core in every process, but for the forks of one where it is done. It reads its settings, too.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from kvferry.common.errors import ConfigError
from kvferry.transfer.backends.choose import set_ucx_defaults
from kvferry.transfer.backends.nixl_api import load_api

with suppress(ConfigError):  # there is no NIXL
    set_ucx_defaults("127.0.0.1")
    package = Path(str(load_api().__file__)).parent
    for library in package.with_name(f"{package.name}.libs").glob("libucs-*.so*"):  # its wheel's own copy
        ctypes.CDLL(str(library))
