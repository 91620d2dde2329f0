"""The target of others' writes and reads: its own poll copies a write into the pages, and a read out of them.

Page numbers and sizes are checked before anything is received or sent: a frame that asks for more is refused.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ...common.errors import TransferError
from .ucx_agent import IncomingBytes, UcxAgent
from .ucx_frames import UcxAck, UcxRead, UcxWrite
from .ucx_pages import Runs, UcxPages

_MAX_WRITE_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class _Receiving:
    """A write whose bytes are coming in."""

    write: UcxWrite
    incoming: IncomingBytes


class UcxTarget:
    """`UcxTarget` applies what others write, and sends what they read."""

    def __init__(self, agent: UcxAgent) -> None:
        self._agent = agent
        self._receiving: list[_Receiving] = []
        self.pages: UcxPages | None = None  # None: nothing is registered, so nothing fits
        self.inbox: list[tuple[str, bytes]] = []  # (agent, notification)

    def clear(self) -> None:
        """Drop what has not been applied or read: the agent that it came to ends."""
        self._receiving.clear()
        self.inbox.clear()

    def on_write(self, write: UcxWrite) -> None:
        """Take the bytes of a write, which follow."""
        num_bytes = _num_bytes(write.pages, write.runs)
        if self.pages is None or not self._takes(self.pages, write, num_bytes):
            self._answer(write.agent, write.write_id, 0)
            return
        incoming = self._agent.receive_bytes(num_bytes, write.write_id, self.pages.device)
        self._receiving.append(_Receiving(write, incoming))

    def on_read(self, read: UcxRead) -> None:
        """Send what is asked for. Once: what comes later of these pages is another read's."""
        if self.pages is None or not self._takes(self.pages, read, _num_bytes(read.pages, read.runs)):
            self._answer(read.agent, read.read_id, 0)
            return
        with contextlib.suppress(TransferError):  # the reader is gone
            self._agent.send_bytes(read.agent, self.pages.gather(read.pages, read.runs), read.read_id)

    def _takes(self, pages: UcxPages, frame: UcxWrite | UcxRead, num_bytes: int) -> bool:
        return pages.has(frame.pages, frame.runs) and 0 < num_bytes <= _MAX_WRITE_BYTES

    def apply(self) -> None:
        """Scatter into the pages each write whose bytes are here."""
        self._receiving = [receiving for receiving in self._receiving if not self._apply(receiving)]

    def _apply(self, receiving: _Receiving) -> bool:
        """Return whether the write is over."""
        if not receiving.incoming.is_over:
            return False
        if not receiving.incoming.are_here:
            return True
        assert self.pages is not None
        write = receiving.write
        num_bytes = self.pages.scatter(write.pages, write.runs, receiving.incoming.staging)
        if write.notify:
            self.inbox.append((write.agent, write.notify))
        self._answer(write.agent, write.write_id, num_bytes)
        return True

    def _answer(self, agent: str, write_id: int, num_bytes: int) -> None:
        with contextlib.suppress(TransferError):  # the writer is gone: nobody waits for the answer
            self._agent.send(agent, UcxAck(write_id=write_id, num_bytes=num_bytes))


def _num_bytes(pages: tuple[int, ...], runs: Runs) -> int:
    return len(pages) * sum(size for _, size in runs)
