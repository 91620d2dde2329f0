"""Packets between a launcher and its fork server, on sockets that nobody else holds.

launcher  descriptors: a file with a Start, the reports' socket, those of its flags, standard error  ->  fork server
launcher  <-  Started, with a pidfd; then Ended. Or Refused                             fork server, on that socket

A Start has the child's whole environment, which is as large as whoever set it wants, and in whatever bytes: no packet
holds every one, nor does text.
"""

from __future__ import annotations

import msgspec

MAX_PACKET_BYTES = 2**17  # of reports: a system's error is much shorter
MAX_FDS = 16


class Start(msgspec.Struct, frozen=True):
    """Run `python -m module args`. Each of `flags` is followed by the number of the descriptor that came for it."""

    module: str
    imports: tuple[str, ...]  # modules that it will need
    args: tuple[bytes, ...]
    flags: tuple[str, ...]
    has_stderr: bool  # the last descriptor is where it writes errors to, else it does as the launcher
    env: tuple[tuple[bytes, bytes], ...]
    title: str  # what `ps` shows


class Started(msgspec.Struct, frozen=True, tag=True):
    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    error: str  # of the system


class Ended(msgspec.Struct, frozen=True, tag=True):
    code: int  # the exit code, or the signal's number below zero


Report = Started | Refused | Ended
