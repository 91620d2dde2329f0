"""A worker (`kvferry.worker`) whose transport breaks at each write, as with a cable that is not plugged in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Never

from kvferry.common.errors import TransferError
from kvferry.transfer.backends.nixl import NixlBackend
from kvferry.worker.process import main


class UnpluggedBackend(NixlBackend):
    """Connects, and then nothing arrives."""

    def write(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b"") -> Never:
        raise TransferError(f"writing to {agent}: the link is down", peer=agent)


if __name__ == "__main__":
    import kvferry.transfer.backends.nixl as nixl

    nixl.NixlBackend = UnpluggedBackend  # type: ignore[misc]  # this process is the broken one
    sys.exit(main())
