"""The lifeline tells the launcher what happens, and the child that the launcher is gone."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import threading

import pytest

from kvferry.wire.lifeline import MAX_EVENT_BYTES, Lifeline, decode_event, lifeline_pair

CHILD = """
import sys
from kvferry.wire.lifeline import Lifeline
lifeline = Lifeline.from_fds(int(sys.argv[1]), None)
lifeline.ready(http="127.0.0.1:8000")
import threading
threading.Event().wait()
"""


def start_child(theirs: socket.socket) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", CHILD, str(theirs.fileno())]
    child = subprocess.Popen(arguments, pass_fds=(theirs.fileno(),), start_new_session=True)
    theirs.close()
    return child


def make_lifeline(theirs: socket.socket, on_lost: threading.Event) -> Lifeline:
    return Lifeline(theirs, on_lost=on_lost.set)


def test_child_dies_when_the_launchers_end_closes() -> None:
    ours, theirs = lifeline_pair()
    child = start_child(theirs)
    ours.setblocking(True)
    assert decode_event(ours.recv(MAX_EVENT_BYTES)) == {"event": "ready", "http": "127.0.0.1:8000"}
    ours.close()
    assert child.wait(timeout=60) == -signal.SIGKILL


def test_launcher_sees_the_end_of_a_child_as_end_of_file() -> None:
    ours, theirs = lifeline_pair()
    child = start_child(theirs)
    ours.setblocking(True)
    ours.recv(MAX_EVENT_BYTES)
    child.kill()
    child.wait(timeout=60)
    assert ours.recv(MAX_EVENT_BYTES) == b""
    ours.close()


def test_each_event_is_one_packet() -> None:
    ours, theirs = lifeline_pair()
    lost = threading.Event()
    lifeline = make_lifeline(theirs, lost)
    lifeline.progress("loading weights", 0.5)
    lifeline.beat()
    lifeline.failed("no such model")
    events = [decode_event(ours.recv(MAX_EVENT_BYTES)) for _ in range(3)]
    assert events == [
        {"event": "progress", "what": "loading weights", "fraction": 0.5},
        {"event": "beat"},
        {"event": "failed", "error": "no such model"},
    ]
    ours.close()
    assert lost.wait(10)


def test_overlong_event_keeps_the_start_of_its_error() -> None:
    ours, theirs = lifeline_pair()
    lost = threading.Event()
    make_lifeline(theirs, lost).failed("x" * (2 * MAX_EVENT_BYTES))
    event = decode_event(ours.recv(MAX_EVENT_BYTES))
    assert event is not None
    assert event["error"] == "x" * 4096
    ours.close()
    assert lost.wait(10)


def test_beats_of_a_child_whose_launcher_reads_nothing_are_dropped() -> None:
    ours, theirs = lifeline_pair()
    lost = threading.Event()
    lifeline = make_lifeline(theirs, lost)
    for _ in range(5000):
        lifeline.beat()
    ours.close()
    assert lost.wait(10)
    lifeline.beat()


def test_what_is_no_event_is_no_event() -> None:
    for packet in (b"", b"{", b"[]", b'{"event": 3}', b'"ready"', b"\xff"):
        assert decode_event(packet) is None


@pytest.mark.slow
def test_the_lifelines_own_thread_beats_with_what_it_is_told_to_say() -> None:
    ours, theirs = lifeline_pair()
    lost = threading.Event()
    lifeline = make_lifeline(theirs, lost)
    lifeline.beat_with(lambda: 7.25)
    ours.setblocking(True)
    assert [decode_event(ours.recv(MAX_EVENT_BYTES)) for _ in range(2)] == [{"event": "beat", "lag_s": 7.25}] * 2
    ours.close()
    assert lost.wait(10)


def test_a_launcher_that_talks_all_the_time_keeps_no_beat_from_coming() -> None:
    ours, theirs = lifeline_pair()
    lost = threading.Event()
    make_lifeline(theirs, lost).beat_with(lambda: 0.0)
    over = threading.Event()

    def talk() -> None:
        while not over.wait(0.01):
            ours.send(b'{"event": "load"}')

    talking = threading.Thread(target=talk)
    talking.start()
    assert select.select([ours], [], [], 10)[0]
    assert decode_event(ours.recv(MAX_EVENT_BYTES)) == {"event": "beat", "lag_s": 0.0}
    over.set()
    talking.join()
    ours.close()
    assert lost.wait(10)
