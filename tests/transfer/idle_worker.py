"""A process whose transfer thread has nothing to do, until its input ends: `python idle_worker.py AGENT`."""

from __future__ import annotations

import sys

from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
from kvferry.transfer.thread import TransferThread


def _fail(error: BaseException) -> None:
    raise SystemExit(f"the transfer thread failed: {error!r}")


if __name__ == "__main__":
    set_ucx_defaults("127.0.0.1")
    thread = TransferThread(open_backend("nixl", sys.argv[1]), on_failure=_fail)
    thread.start()
    print("idle", flush=True)
    sys.stdin.read()
    thread.close()
