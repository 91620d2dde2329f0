"""Threads that offer their core to others: while they work, and no longer; what they do is not disturbed by it."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest

from kvferry.common.priority import CoreOffers, give_way, offering_core

TIMERS = Path("/proc/self/timers")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a policy and timers of Linux")


def _offering() -> set[int]:
    """Return the threads whose timers run."""
    if not TIMERS.exists():
        pytest.skip("this kernel does not list timers")
    return {int(word.rpartition(".")[2]) for word in TIMERS.read_text().split() if word.startswith("signal/tid.")}


def test_a_thread_offers_its_core_while_it_works_and_no_longer() -> None:
    blob, digests, ids = b"x" * (8 << 20), list[str](), list[set[int]]()

    def work() -> None:
        give_way(threading.get_native_id())
        with offering_core():
            digests.extend(hashlib.sha256(blob).hexdigest() for _ in range(8))
            reader, writer = os.pipe()  # and a call that waits while signals come
            threading.Timer(0.05, os.write, (writer, b"y")).start()
            digests.append(os.read(reader, 1).decode())
            ids.append(_offering())
            os.close(reader)
            os.close(writer)
        ids.append(_offering())
        assert os.sched_getscheduler(0) == os.SCHED_IDLE

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert digests == [hashlib.sha256(blob).hexdigest()] * 8 + ["y"]
    assert thread.native_id in ids[0] and thread.native_id not in ids[1]


def test_another_threads_core_is_offered_until_somebody_ends_it() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    offers = CoreOffers(thread.native_id)
    assert thread.native_id in _offering()
    offers.end()
    offers.end()
    assert thread.native_id not in _offering()
    done.set()
    thread.join()


def test_a_thread_that_has_ended_is_none() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    give_way(thread.native_id)
    CoreOffers(thread.native_id).end()
    assert thread.native_id not in _offering()
