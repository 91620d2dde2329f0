"""Where processes of backend_peer.py come from: each of the two backends has a copy of UCX of its own."""

from __future__ import annotations

from kvferry.tests.forks import Forks

PEERS = {
    "nixl": Forks("kvferry.transfer.backends.nixl", "kvferry.tests.transfer.loaded_nixl"),
    "ucx": Forks("kvferry.transfer.backends.ucx", "kvferry.tests.transfer.loaded_ucxx"),
}
