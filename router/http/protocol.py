"""uvicorn's HTTP protocol with an end for clients that are slow on purpose.

    connected or between requests   ->  a request begins within the keep-alive limit   else closed
    a head has begun                ->  head complete within HEAD_LIMIT_S              else closed
    body                            ->  `read_body` has a deadline                     else 408
    not reading an answer           ->  the write buffer drains within WRITE_LIMIT_S, else the connection is aborted:
                                        the answer's watcher sees a client that left
    answered, to be closed          ->  what is left to write gone within WRITE_LIMIT_S, else aborted

A client is read while it is answered, so that its leaving is seen at once; that is why a second request behind one
that is not answered yet is dropped, and the connection closed after the answer. An answer that comes before its
request's body is whole is followed by a short time of reading on: a reset would take the answer from the client.
Bytes that are no HTTP at all are answered in the API's error shape. What is received is parsed by turns, and within
bounds for each message (`intake.py`); trailers are dropped.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Self

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ...common.errors import CapacityError, RequestError
from ..state.errors import failure_of
from .connection_limits import Connections, LimitedConnection
from .intake import PIECE_BYTES, HeldFlow, Intake, MessageBytes, Sink
from .kernel import end_reading
from .plain_parser import PlainParser
from .stream_writer import CHUNK_ENCODER, ChunkEncoder, StreamWriter, WriteCoalescer
from .ways_out import Closer, PlainEncoder, Unframed, last_answer

HEAD_LIMIT_S = 5.0
WRITE_LIMIT_S = 30.0
LINGER_S = 2.0  # reading on after an early answer
LINGER_BYTES = 64 * 2**20

_errors_only = logging.getLogger("uvicorn.error.http")
_errors_only.setLevel(logging.ERROR)


class _Unwanted(Exception):
    """Stops the parser: what follows is not read."""


class DeadlineProtocol(HttpToolsProtocol):
    """One connection."""

    head_limit_s = HEAD_LIMIT_S
    write_limit_s = WRITE_LIMIT_S
    linger_s = LINGER_S
    books: Connections
    coalescer: WriteCoalescer
    intake: Intake
    sink: Sink
    flow: HeldFlow

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = PlainParser(self)  # type: ignore[assignment]  # all that uvicorn calls of its own
        self.logger = _errors_only  # what clients send is not worth a line
        self._wait_timer: asyncio.TimerHandle | None = None  # for a request, then for its head
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._unparsed = memoryview(b"")
        self._message = MessageBytes()
        self._fault: RequestError | None = None  # why the parser was stopped
        self._chunk_encoder: ChunkEncoder | None = None  # of the latest request
        self._num_discarded: int | None = None  # None: what comes is parsed
        self.handshake: LimitedConnection | None = None  # that has its place among the connections, under TLS

    @classmethod
    def keeping(cls, books: Connections) -> type[Self]:
        """The protocol of a server whose connections are in these books."""
        return type(
            cls.__name__, (cls,), {"books": books, "coalescer": WriteCoalescer(), "intake": Intake(), "sink": Sink()}
        )

    # --- the connection ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        self.stream_writer = StreamWriter(transport, self.coalescer)
        full = self.books.open(self, self.client[0] if self.client else "", instead_of=self.handshake)
        self.handshake = None
        if full:
            whose = "from this address" if full == "address" else "to this server"
            self._refuse(CapacityError(f"there are too many connections {whose}", status=503))
            self.end()
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.books.close(self)
        self._await_nothing()
        if self._end_timer is not None:
            self._end_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        if self._chunk_encoder is not None:
            self._chunk_encoder.lose()
        self.cycle = None  # type: ignore[assignment]  # it leads back here

    def data_received(self, data: bytes) -> None:
        if self._num_discarded is not None:
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self.transport.abort()
            self.sink.take(self.flow)
            return
        if self._unparsed:
            self._unparsed = memoryview(bytes(self._unparsed) + data)
        else:
            self._unparsed = memoryview(data)
            self.intake.offer(self)

    def parse_piece(self) -> bool:
        piece, self._unparsed = self._unparsed[:PIECE_BYTES], self._unparsed[PIECE_BYTES:]
        if self._is_wanted:
            super().data_received(piece)  # type: ignore[arg-type]  # the parser takes any buffer
        if self._is_wanted:
            try:
                self._message.add_piece(len(piece))
            except RequestError as error:
                self.books.observer.on_slow_client("framing")
                self._stop_reading(error)
        if not self._is_wanted:
            self._unparsed = memoryview(b"")
        return bool(self._unparsed)

    @property
    def _is_wanted(self) -> bool:
        """True while what was received is to be parsed."""
        return self._num_discarded is None and self.parser is not None

    def hold(self) -> None:
        self.flow.hold()

    def release(self) -> None:
        self.flow.release()

    def evict(self) -> bool:
        """A newcomer needs the room, and nothing is computed here. A request that has come is answered."""
        if self.flow.has_unread or self.stream_writer.has_unsent():
            return False
        self.end()
        end_reading(self.transport)  # `abort` would drop what a TLS transport has given to the one below it
        return True

    @property
    def has_request(self) -> bool:
        """One is being read or answered."""
        return self._message.is_in_head or (self.cycle is not None and not self.cycle.response_complete)

    def end(self) -> None:
        """Close when everything is written; a client that goes on with a body is read a while longer."""
        self._await_nothing()
        if self.transport.is_closing() or self._end_timer is not None:
            return
        self.stream_writer.flush()
        if self.cycle is not None and self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()
            self._end_timer = self.loop.call_later(self.write_limit_s, self.transport.abort)

    def _linger(self) -> None:
        """Say no more, and read on for a while."""
        self._discard()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._end_timer = self.loop.call_later(self.linger_s, self.transport.abort)

    def _discard(self) -> None:
        self._num_discarded = self._num_discarded or 0

    # --- reading ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._discard()
            raise _Unwanted
        super().on_message_begin()
        self._message = MessageBytes.begin()
        self._set_wait_timer(self.head_limit_s, "head")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._message.is_in_head:  # else it is a trailer
            self._message.add_header()
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        try:
            self._message.end_head()
        except RequestError as error:
            self._fault = error
            raise _Unwanted from error
        super().on_headers_complete()
        self.cycle.keep_alive = False  # until its body is whole: after an answer before that nothing more is parsed
        self._await_nothing()
        self.books.work(self)
        is_plain = self.scope["http_version"] == "1.0"
        write = Unframed(self.stream_writer.write) if is_plain else self.stream_writer.write
        self.cycle.transport = Closer(write, self.end, self.transport.is_closing)  # type: ignore[assignment]
        self._chunk_encoder = (PlainEncoder if is_plain else ChunkEncoder)(self.stream_writer, self.flow)
        self.scope[CHUNK_ENCODER] = self._chunk_encoder  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        self._message.add_content(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.cycle.response_started:
            self.cycle.keep_alive = self.may_go_on

    @property
    def may_go_on(self) -> bool:
        """Another request may follow the one that has been read."""
        return self.scope["http_version"] != "1.0" and self.parser.should_keep_alive()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours does not start anew with every byte
        if self.cycle.more_body:
            self.end()
        elif not self.transport.is_closing():
            self.books.wait(self)
            self._await_request()

    def _unsupported_upgrade_warning(self) -> None:
        """The request asked for another protocol, and has no body: it is answered as it stands, then nothing more."""
        self._discard()
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        if self._num_discarded is None:
            self._stop_reading(self._fault or RequestError("this is not HTTP/1.1", code="invalid_http"))

    def _stop_reading(self, error: RequestError) -> None:
        """Refuse a request that is not whole: what waits for the rest of it is told that the client is gone."""
        self._refuse(error)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._linger()

    def _refuse(self, error: RequestError | CapacityError) -> None:
        """Answer without the application. The caller ends the connection."""
        self._await_nothing()
        self._discard()
        self.stream_writer.flush()
        self.transport.write(last_answer(failure_of(error)))

    # --- time limits ------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_limit_s, self._cut, "read")

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._cut("idle")

    def _await_request(self) -> None:
        self._set_wait_timer(self.timeout_keep_alive, "idle")

    def _set_wait_timer(self, limit_s: float, kind: str) -> None:
        self._await_nothing()
        self._wait_timer = self.loop.call_later(limit_s, self._cut, kind)

    def _await_nothing(self) -> None:
        if self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None

    def _cut(self, kind: str) -> None:
        self.books.observer.on_slow_client(kind)
        if kind == "read":
            self.transport.abort()
        else:
            self.end()
