"""A router reads its keys, secrets and certificates again on SIGHUP, and when its launcher says so."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import structlog

from ...common.errors import ConfigError
from .credentials import RouterCredentials

log = structlog.get_logger(__name__)

Event = dict[str, object]


class ReloadLauncher(Protocol):
    """The launcher's end of the lifeline."""

    def send(self, event: Mapping[str, object]) -> None: ...

    def listen(self, on_event: Callable[[Event], None]) -> None: ...


@contextlib.contextmanager
def reloading(
    credentials: RouterCredentials, launcher: ReloadLauncher | None, on_other: Callable[[Event], None]
) -> Iterator[None]:
    """Reload when asked to, while the block runs. What else the launcher says goes to `on_other`, on the event loop."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()

    def on_event(event: Event) -> None:
        """Runs on the lifeline's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: this process is ending
            if event["event"] == "reload":
                loop.call_soon_threadsafe(_reload, credentials, launcher, context=context)
            else:
                loop.call_soon_threadsafe(on_other, event, context=context)

    if launcher is not None:
        launcher.listen(on_event)
    loop.add_signal_handler(signal.SIGHUP, _reload, credentials, launcher)
    with contextlib.suppress(ConfigError):  # SIGHUP was lost until here: files may be newer than what was read at start
        credentials.reload()
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _reload(credentials: RouterCredentials, launcher: ReloadLauncher | None) -> None:
    """Read all files again. What cannot be used leaves everything as it was, and is told."""
    failure = ""
    try:
        credentials.reload()
    except ConfigError as error:
        failure = str(error)
        log.error("reload_failed", error=failure)
    else:
        log.info("reloaded", api_keys=credentials.clients.num_good, admin_keys=credentials.operators.num_good)
    if launcher is not None:
        launcher.send({"event": "reloaded", "error": failure})
