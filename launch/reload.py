"""A reload: every process reads its keys, secrets and certificates again, none restarts, nobody is cut off.

files read here first: a mistake in them is told, and no process hears of it
─> reload to each process ─> the word of each that is up that it has done so, or why not

A router reads for a while, so an answer may come when its question was given up and the next one is asked: each has a
number, which comes back with the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..common.router_config import RouterConfig
from ..settings.key_file import read_key_file
from ..settings.tls import read_tls
from ..wire.credentials import read_secrets
from .process import Child, ChildState

_ANSWER_S = 5.0


def read_credentials(config: RouterConfig, env: Mapping[str, str]) -> tuple[bytes, ...]:
    """Check every file of credentials; returns the secrets. Raises ConfigError."""
    for path, setting in ((config.api_key_file, "api_key_file"), (config.admin_key_file, "admin_key_file")):
        if path is not None:
            read_key_file(path, setting)
    read_tls(config)
    return read_secrets(config.secret_file, env)


def outcome(failures: Sequence[str]) -> str:
    """Say how a reload went, as the operator's log has it."""
    return f"reload failed: {'; '.join(failures)}" if failures else "keys, secrets and certificates are read again"


class Reload:
    """Asks children to read their files again, and takes what they answer."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._number = 0  # of the last question
        self._waiting: dict[str, asyncio.Future[str]] = {}

    def on_event(self, name: str, event: Mapping[str, object]) -> None:
        """Take an event of a child; those of other kinds are none of ours, nor are answers to earlier questions."""
        answer = self._waiting.get(name)
        # A worker's answer has no number: it reads its one small file on its loop, at once.
        if event["event"] != "reloaded" or event.get("number", self._number) != self._number:
            return
        if answer is not None and not answer.done():
            answer.set_result(str(event.get("error", "")))

    async def ask(self, children: Sequence[Child]) -> list[str]:
        """Let each child reload and say why some could not; empty: all have.

        Those that start may have read the files already: they hear it, too, and obey when they can. What they make of
        it is in their logs, as nobody waits for that.
        """
        async with self._one_at_a_time:
            self._number += 1
            asked = [child for child in children if child.state is ChildState.READY]
            loop = asyncio.get_running_loop()
            self._waiting = {child.name: loop.create_future() for child in asked}
            for child in children:
                child.send({"event": "reload", "number": self._number})
            if asked:
                await asyncio.wait(self._waiting.values(), timeout=_ANSWER_S)
            failures = [
                f"{name}: {answer.result() if answer.done() else 'no answer'}"
                for name, answer in self._waiting.items()
                if not answer.done() or answer.result()
            ]
            self._waiting = {}
        return failures
