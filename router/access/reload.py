"""A router reads its keys, secrets and certificates again on SIGHUP, and when its launcher says so.

    asked ─> wait for the reloads before it ─> read on another thread ─> hold from now on, on the event loop ─> told

Files of many keys take a while, in which requests are served. Reloads take turns: what the last one read holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from ...common.errors import ConfigError
from .credentials import RouterCredentials

log = structlog.get_logger(__name__)

Event = dict[str, object]


class LauncherLink(Protocol):
    """The launcher hears what happens here."""

    def send(self, event: Mapping[str, object]) -> None: ...


class ReloadLauncher(LauncherLink, Protocol):
    """A launcher that also says what is to be done here."""

    def listen(self, on_event: Callable[[Event], None]) -> None: ...


@contextlib.contextmanager
def reloading(
    credentials: RouterCredentials, launcher: ReloadLauncher | None, on_other: Callable[[Event], None]
) -> Iterator[None]:
    """Reload when asked to, while the block runs. What else the launcher says goes to `on_other`, on the event loop."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    reloads = _Reloads(credentials, launcher)

    def on_event(event: Event) -> None:
        """Runs on the lifeline's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: this process is ending
            if event["event"] == "reload":
                loop.call_soon_threadsafe(reloads.begin, event, context=context)
            else:
                loop.call_soon_threadsafe(on_other, event, context=context)

    if launcher is not None:
        launcher.listen(on_event)
    loop.add_signal_handler(signal.SIGHUP, reloads.begin)
    with contextlib.suppress(ConfigError):  # SIGHUP was lost until here: files may be newer than what was read at start
        credentials.reload()
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        reloads.end()


class _Reloads:
    """Reloads that were asked for, one after the other. Lives on the event loop."""

    def __init__(self, credentials: RouterCredentials, launcher: ReloadLauncher | None) -> None:
        self._credentials, self._launcher = credentials, launcher
        self._turn = asyncio.Lock()  # whoever asked first has it first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reload")  # of its own: a key is revoked at any load
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_ended = False

    def begin(self, question: Event | None = None) -> None:
        """`question`: the launcher's; None: nobody waits for an answer."""
        if not self._has_ended:
            task = asyncio.get_running_loop().create_task(self._reload(question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def end(self) -> None:
        """Change nothing any more: a thread that still reads has read for nobody."""
        self._has_ended = True
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _reload(self, question: Event | None) -> None:
        """Read all files again. What cannot be used leaves everything as it was, and is told."""
        credentials, failure = self._credentials, ""
        loop = asyncio.get_running_loop()
        async with self._turn:
            try:
                credentials.take(await loop.run_in_executor(self._thread, credentials.read))
            except ConfigError as error:
                failure = str(error)
                log.error("reload_failed", error=failure)
            else:
                log.info("reloaded", api_keys=credentials.clients.num_good, admin_keys=credentials.operators.num_good)
            if self._launcher is not None and question is not None:
                self._launcher.send({"event": "reloaded", "number": question.get("number"), "error": failure})
