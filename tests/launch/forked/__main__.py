"""Say over --told-fd what this process is, then end as the first argument says."""

import json
import os
import signal
import socket
import sys

from . import IMPORTED_BY

if __name__ == "__main__":
    end, *others, flag, told_fd = sys.argv[1:]
    with open("/proc/self/cmdline", "rb") as file:
        title = file.read().rstrip(b"\0").decode()
    facts = {
        "args": others,
        "flag": flag,
        "env": dict(os.environ),
        "imported_by": IMPORTED_BY,
        "group": os.getpgid(0),
        "title": title,
        "open": sorted(os.listdir("/proc/self/fd")),
    }
    with socket.socket(fileno=int(told_fd)) as told:
        told.sendall(json.dumps(facts).encode() + b"\n")
        if end == "wait":
            told.recv(1)  # until the test has ended, or says so
            sys.exit(0)
    print("said", file=sys.stderr, flush=True)
    if end == "raise":
        raise RuntimeError("as it was told")
    if end == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(int(end))
