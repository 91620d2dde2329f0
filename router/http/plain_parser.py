"""A parser that reads a request which asks for another protocol, and has a body, as if it did not ask.

    a head with Upgrade ─> httptools ends the message there ─> a new parser of httptools gets the head without Upgrade,
                                                               and then what has come behind it

A server may ignore the field (RFC 9110, 7.8), and its client goes on in HTTP/1.1: Java's HttpClient and `curl --http2`
ask for h2c with their first request, whatever it is. What has no body, as a web socket's request, ends with its head.
"""

from __future__ import annotations

import contextlib

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .intake import MAX_HEADERS

_OF_BODIES = frozenset({b"content-length", b"transfer-encoding"})


class PlainParser:
    """`PlainParser` is for uvicorn what its own parser is, an object of httptools. It belongs to `connection`."""

    def __init__(self, connection: HttpToolsProtocol) -> None:
        self._callbacks = _Callbacks(connection)
        self._parser = _parser(self._callbacks)

    def feed_data(self, data: memoryview) -> None:
        """Raises HttpParserError, and HttpParserUpgrade at the end of a request that has no body."""
        try:
            self._parser.feed_data(data)
            return
        except HttpParserUpgrade as error:
            head, self._callbacks.plain_head = self._callbacks.plain_head, b""
            if not head:
                raise
            (num_read,) = error.args
        self._parser = _parser(self._callbacks)
        self._parser.feed_data(head)
        self.feed_data(data[num_read:])

    def should_upgrade(self) -> bool:
        return self._parser.should_upgrade()

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def get_http_version(self) -> str:
        return self._parser.get_http_version()


class _Callbacks:
    """The connection's own, but that the end of a head which is to be read again is kept from it.

    They do not lead to the parser but by the connection: it lets go of both when it is lost.
    """

    def __init__(self, connection: HttpToolsProtocol) -> None:
        self._connection = connection
        self.on_message_begin, self.on_body = connection.on_message_begin, connection.on_body
        self.on_url, self.on_header = connection.on_url, connection.on_header
        self.plain_head = b""  # to be read in place of the one that was read last

    def on_headers_complete(self) -> None:
        self.plain_head = _plain_head(self._connection)
        if not self.plain_head:
            self._connection.on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.plain_head:
            self._connection.on_message_complete()


def _parser(callbacks: _Callbacks) -> HttpRequestParser:
    parser = HttpRequestParser(callbacks)
    with contextlib.suppress(AttributeError):  # httptools before 0.6.3
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
    return parser


def _plain_head(connection: HttpToolsProtocol) -> bytes:
    """Return the head that was read without Upgrade; empty: it stands as it is, also where its fields are too many."""
    parser, headers = connection.parser, connection.headers
    if not parser.should_upgrade() or len(headers) > MAX_HEADERS:
        return b""
    plain = [(name, value) for name, value in headers if name != b"upgrade"]
    if len(plain) == len(headers) or not any(name in _OF_BODIES for name, _ in plain):
        return b""
    line = b"%b %b HTTP/%b" % (parser.get_method(), connection.url, parser.get_http_version().encode())
    return b"\r\n".join([line, *(b"%b: %b" % field for field in plain), b"", b""])
