"""A display on a terminal that has gone, or that stands still, is no trouble for those whom it shows."""

from __future__ import annotations

import os
import pty
import select
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from kvferry.common.lines import drain
from kvferry.launch.progress import Display, LogDisplay, make_display

LIMIT_S = 60.0


class Terminal:
    def __init__(self) -> None:
        self.screen, behind = pty.openpty()
        self.stream = os.fdopen(behind, "w", encoding="utf-8")
        self.has_gone = False

    def go(self) -> None:
        os.close(self.screen)
        self.has_gone = True

    def shown(self, end: str) -> str:
        """What it shows up to this text."""
        shown = b""
        while end.encode() not in shown:
            assert select.select([self.screen], [], [], LIMIT_S)[0], shown
            shown += os.read(self.screen, 1 << 16)
        return shown.decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    if not made.has_gone:
        made.go()  # whoever waits for it gives up
    drain()
    made.stream.close()


def use(display: Display) -> None:
    """Do with it all that a launcher does."""
    display.on_event("d-0", {"event": "progress", "what": "loading", "fraction": 0.5})
    display.on_event("d-0", {"event": "ready"})
    display.done()
    display.greet("kvferry serves", {})
    for _ in range(500):
        display.on_event("d-0", {"event": "restart", "reason": "ended by SIGKILL", "delay_s": 0.0})
        display.note("everything has ended")


def ends(work: Callable[[], object]) -> bool:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return not thread.is_alive()


@pytest.mark.parametrize("is_up", [True, False])
def test_a_terminal_that_has_gone_ends_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    display = make_display(terminal.stream, is_text=True)
    if is_up:
        display.done()
    terminal.go()
    use(display)


def test_nobody_waits_for_a_terminal_that_stands_still(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    display = make_display(terminal.stream, is_text=True)
    assert ends(lambda: use(display)), "it waits for somebody to read"


def test_the_bars_are_gone_when_others_may_write(terminal: Terminal) -> None:
    display = make_display(terminal.stream, is_text=True)
    shown: list[str] = []
    reading = threading.Thread(target=lambda: shown.append(terminal.shown("from a child\r\n")), daemon=True)
    reading.start()
    display.on_event("d-0", {"event": "progress", "what": "loading", "fraction": 0.5})
    for _ in range(1_000):
        display.note("a warning")
    display.done()
    os.write(terminal.stream.fileno(), b"from a child\n")
    reading.join()
    assert "loading" in shown[0]
    assert shown[0].count("a warning") == 1_000


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_greeting_may_have_no_reader(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        display = make_display(terminal.stream, is_text=True) if is_terminal else LogDisplay(is_text=True)
        display.done()
        display.greet("kvferry serves", {})
        drain()
