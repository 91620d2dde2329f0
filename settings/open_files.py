"""The limit of open files, and the connections that it leaves room for."""

from __future__ import annotations

import resource

from ..common.errors import ConfigError

MAX_CONNECTIONS = 4096
MIN_CONNECTIONS = 256  # fewer must be asked for
_OTHER_FILES = 256  # what the process has open besides


def room_for_connections(asked: int | None) -> int:
    """Count the connections that there may be, and raise this process's limit of open files for them if it can be.

    None: MAX_CONNECTIONS, or as many as the limit allows. Raises ConfigError where those that are asked for do not fit.
    """
    least = MIN_CONNECTIONS if asked is None else asked
    # Where it can be, half as many more: of answers that are kept (`router/kept/answers.py`).
    num_files = _raise_file_limit(((asked or MAX_CONNECTIONS) + _OTHER_FILES) * 3 // 2)
    room = num_files - _OTHER_FILES
    if room < least:
        way_out = f", or set --max-connections {room}" if room > 0 else ""
        raise ConfigError(
            f"max_connections: {least} connections need {least + _OTHER_FILES} open files, and this process may have "
            f"{num_files}; raise that limit (ulimit -n {least + _OTHER_FILES}){way_out}"
        )
    return min(asked or MAX_CONNECTIONS, room)


def _raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files to `wanted` or the hard limit; return what it is, at most `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most if soft == resource.RLIM_INFINITY else min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
