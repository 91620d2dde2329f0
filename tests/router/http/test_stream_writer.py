"""Answers leave at the end of the event loop's turn: one write for each connection, in order."""

from __future__ import annotations

import asyncio

from kvferry.router.http.stream_writer import StreamWriter, WriteCoalescer


class Transport(asyncio.Transport):
    def __init__(self, log: list[tuple[str, bytes]], name: str) -> None:
        super().__init__()
        self.is_gone = False
        self._log = log
        self._name = name

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._log.append((self._name, bytes(data)))

    def is_closing(self) -> bool:
        return self.is_gone


def writers(*names: str) -> tuple[list[tuple[str, bytes]], dict[str, Transport], dict[str, StreamWriter]]:
    log: list[tuple[str, bytes]] = []
    coalescer = WriteCoalescer()
    transports = {name: Transport(log, name) for name in names}
    return log, transports, {name: StreamWriter(transport, coalescer) for name, transport in transports.items()}


async def test_what_a_connection_gets_in_a_turn_goes_out_in_one_write_at_its_end() -> None:
    log, _, out = writers("a", "b")
    out["a"].write(b"1")
    out["b"].write(b"2")
    out["a"].write(b"3")
    assert log == []
    await asyncio.sleep(0)
    assert log == [("a", b"13"), ("b", b"2")]
    out["b"].write(b"4")
    await asyncio.sleep(0)
    assert log[2:] == [("b", b"4")]


async def test_a_flush_comes_before_the_turn_ends_and_nothing_is_written_twice() -> None:
    log, _, out = writers("a")
    out["a"].write(b"1")
    out["a"].flush()
    assert log == [("a", b"1")]
    out["a"].write(b"2")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log == [("a", b"1"), ("a", b"2")]


async def test_much_is_written_at_once_so_that_the_transport_can_say_that_it_is_full() -> None:
    log, _, out = writers("a")
    out["a"].write(b"x" * 100_000)
    assert len(log) == 1


async def test_a_connection_that_is_gone_gets_nothing_and_keeps_nobody_else_from_it() -> None:
    log, transports, out = writers("a", "b")
    for writer in out.values():
        writer.write(b"1")
    transports["a"].is_gone = True
    await asyncio.sleep(0)
    assert log == [("b", b"1")]


async def test_what_is_called_before_a_turns_end_writes_with_that_turn() -> None:
    log, _, out = writers("a", "b")
    coalescer = out["a"].coalescer
    coalescer.before_end(lambda: out["b"].write(b"2"))
    out["a"].write(b"1")
    await asyncio.sleep(0)
    assert log == [("a", b"1"), ("b", b"2")]
    coalescer.before_end(lambda: coalescer.before_end(lambda: out["a"].write(b"3")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log[2:] == [("a", b"3")]
