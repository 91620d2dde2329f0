"""`kvferry serve` without grant signatures, for `cost.py` alone: what they cost is what is left out here.

python -m kvferry.benchmarks.faults.bare serve MODEL ...     a launcher whose workers are started as below
python -m kvferry.benchmarks.faults.bare worker ...          a worker that mints empty signatures and takes any
"""

from __future__ import annotations

import sys

from kvferry import cli
from kvferry.launch.local import LocalLauncher
from kvferry.transfer.receive import grants, opens
from kvferry.transfer.send import sender
from kvferry.worker import process as worker

_MODULE = "kvferry.benchmarks.faults.bare"


def main() -> int:
    role, *arguments = sys.argv[1:]
    if role == "serve":
        defaults = LocalLauncher.__init__.__kwdefaults__
        assert defaults is not None and "worker_program" in defaults
        defaults["worker_program"] = (sys.executable, "-m", _MODULE, "worker")
        cli.main(["serve", *arguments])
    for module, name, bare in (
        (grants, "mint_grant", lambda key, grant, request_id, attempt: grant),
        (opens, "is_minted", lambda key, grant, request_id, attempt, mac: True),
        (sender, "open_mac", lambda grant, request_id, attempt: b""),
    ):
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        setattr(module, name, bare)
    sys.argv = ["kvferry.worker", *arguments]
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
