"""HTTP connections end when a router stops: none that is in use is cut, none that is idle is waited for.

    an answer is under way, its head not sent   ->  its head says `connection: close`
    its head was sent before                    ->  it ends as it began; then the connection is idle
    idle                                        ->  one more request is taken, and answered with `connection: close`;
                                                    after a while without one it is closed

A client that keeps connections open may send its next request in the very moment in which a server closes one: it
would see a request fail that nobody worked on. Hence the while, and a last look for bytes that came meanwhile.

A TLS connection is over when both have said so. A client that idles says nothing: once its machine has all that was
written, the connection is closed as if it had.
"""

from __future__ import annotations

from .kernel import end_reading
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

    @property
    def may_go_on(self) -> bool:
        return super().may_go_on and not self.is_leaving

    def shutdown(self) -> None:
        """The server stops: what idles ends, and half a head."""
        self.leave(0.0)
        if self._message.is_in_head:
            self.end()

    def end(self) -> None:
        super().end()
        if self.scheme == "https" and self.transport.is_closing() and self in self.connections:
            self._set_wait_timer(_LOOK_AGAIN_S, _GOODBYE)

    def _cut(self, kind: str) -> None:
        if kind == _GOODBYE:
            if self.stream_writer.has_unsent():
                self._set_wait_timer(_LOOK_AGAIN_S, _GOODBYE)
            else:
                end_reading(self.transport)  # no `abort`, as in `evict`
        elif not self.is_leaving or kind != "idle":
            super()._cut(kind)
        elif self.flow.has_unread:
            self._set_wait_timer(_LOOK_AGAIN_S, "idle")
        else:
            self.end()
