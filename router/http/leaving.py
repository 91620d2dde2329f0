"""HTTP connections end when a router stops: none that is in use is cut, none that is idle is waited for.

    an answer is under way, its head not sent   ->  its head says `connection: close`
    its head was sent before                    ->  it ends as it began; then the connection is idle
    idle                                        ->  one more request is taken, and answered with `connection: close`;
                                                    after a while without one it is closed

A client that keeps connections open may send its next request in the very moment in which a server closes one: it
would see a request fail that nobody worked on. Hence the while, and a last look for bytes that came meanwhile.

A TLS connection is over when both have said so. A client that idles says nothing: it is not waited for, once its
machine has all that was written.
"""

from __future__ import annotations

import array
import fcntl
import termios

from .protocol import DeadlineProtocol

_LOOK_AGAIN_S = 0.05
_GOODBYE = "goodbye"  # waited for: the client's, under TLS


class Connection(DeadlineProtocol):
    """One client's connection."""

    is_leaving = False

    def leave(self, idle_s: float) -> None:
        """End as soon as it may; idle, after so long."""
        self.is_leaving = True
        self.timeout_keep_alive = idle_s  # type: ignore[assignment]  # uvicorn's setting is whole seconds, its timer not
        if not self.has_request:
            self._await_request()
        elif self.cycle is not None and not self.cycle.response_complete and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.is_leaving:
            self.cycle.keep_alive = False

    def end(self) -> None:
        super().end()
        if self.is_leaving and self.transport.is_closing():
            self._set_wait_timer(_LOOK_AGAIN_S, _GOODBYE)

    def _cut(self, kind: str) -> None:
        if kind == _GOODBYE:
            if self._in_kernel(termios.TIOCOUTQ):
                self._set_wait_timer(_LOOK_AGAIN_S, _GOODBYE)
            else:
                self.transport.abort()
        elif not self.is_leaving or kind != "idle":
            super()._cut(kind)
        elif self.flow.is_held or self._in_kernel(termios.FIONREAD):  # bytes have come that this loop has not come to
            self._set_wait_timer(_LOOK_AGAIN_S, "idle")
        else:
            self.end()

    def _in_kernel(self, queue: int) -> int:
        """Return how many bytes one of the socket's queues holds."""
        sock = self.transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return 0
        count = array.array("i", [0])
        fcntl.ioctl(sock.fileno(), queue, count)
        return count[0]
