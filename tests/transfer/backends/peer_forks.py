"""Where processes of backend_peer.py come from."""

from __future__ import annotations

from kvferry.tests.forks import Forks

PEERS = Forks("torch", "kvferry.transfer.backends.choose")
