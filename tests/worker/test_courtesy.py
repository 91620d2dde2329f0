"""How a worker's processes give way to others."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_every_thread_that_runs_yields_and_takes_it_back_where_that_is_permitted() -> None:
    program = (
        "import os, threading; from kvferry.worker.courtesy import Courtesy\n"
        "stop = threading.Event(); other = threading.Thread(target=stop.wait); other.start()\n"
        "now = lambda: [os.getpriority(os.PRIO_PROCESS, thread) for thread in (os.getpid(), other.native_id)]\n"
        "courtesy = Courtesy(3, os.getpid())\n"
        "courtesy.set(True); polite = now(); courtesy.set(False)\n"
        "print('[%s, %s, %d]' % (polite, now(), courtesy.is_revocable))\n"
        "stop.set()"
    )
    base = os.getpriority(os.PRIO_PROCESS, 0)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    polite, after, is_revocable = json.loads(done.stdout)
    assert polite == [min(19, base + 3)] * 2
    assert after == ([base] * 2 if is_revocable else polite)
