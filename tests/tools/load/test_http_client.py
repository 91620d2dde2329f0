from __future__ import annotations

import asyncio
import time

import pytest

from kvferry.common.errors import ConfigError
from kvferry.tools.load.http_client import HttpClient, HttpError, ResponseHead

from ...benchmarks.scripted_server import Received, Script, scripted_server


async def test_body_pieces_are_handed_on_as_they_come() -> None:
    async with scripted_server(lambda _: Script([b"one", b"two", b"three"])) as server:
        heads: list[ResponseHead] = []
        pieces: list[bytes] = []
        client = HttpClient(server.base_url)
        head = await client.request("GET", "/x", on_head=heads.append, on_body=pieces.append)
        client.close()
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
    assert heads == [head]
    assert b"".join(pieces) == b"onetwothree"


async def test_connection_is_used_again_after_a_whole_answer() -> None:
    async with scripted_server(lambda _: Script([b"x"])) as server:
        client = HttpClient(server.base_url)
        for _ in range(3):
            assert (await client.read("POST", "/", body=b"{}"))[1] == b"x"
        client.close()
    assert (len(server.requests), server.num_connections) == (3, 1)


async def test_request_is_repeated_when_the_server_closes_a_kept_connection_unanswered() -> None:
    scripts = iter([Script([b"first"]), Script([], raw=b""), Script([b"second"])])
    async with scripted_server(lambda _: next(scripts)) as server:
        client = HttpClient(server.base_url)
        answers = [(await client.read("GET", "/"))[1] for _ in range(2)]
        client.close()
    assert answers == [b"first", b"second"]
    assert (len(server.requests), server.num_connections) == (3, 2)


async def test_request_that_was_dropped_after_a_while_may_have_been_computed_and_is_not_repeated() -> None:
    scripts = iter([Script([b"first"]), Script([], raw=b"", after_s=0.3), Script([b"second"])])
    async with scripted_server(lambda _: next(scripts)) as server:
        client = HttpClient(server.base_url)
        await client.read("POST", "/")
        with pytest.raises(HttpError, match="before the end"):
            await client.read("POST", "/")
        client.close()
    assert len(server.requests) == 2


async def test_request_is_repeated_once_over_a_new_connection() -> None:
    num_resent = 0

    def on_resend() -> None:
        nonlocal num_resent
        num_resent += 1

    def script_of(_: Received) -> Script:
        return Script([b"x"]) if len(server.requests) <= 3 else Script([], raw=b"")

    async with scripted_server(script_of) as server:
        client = HttpClient(server.base_url)
        await asyncio.gather(*(client.read("GET", "/") for _ in range(3)))
        with pytest.raises(HttpError, match="before the end"):
            await client.request("GET", "/", on_resend=on_resend, on_body=lambda _: None)
        client.close()
    assert (server.num_connections, len(server.requests), num_resent) == (4, 5, 1)


async def test_a_busy_client_takes_its_own_lag_for_no_wait() -> None:
    scripts = iter([Script([b"x"]), Script([], raw=b""), Script([b"y"])])
    async with scripted_server(lambda _: next(scripts)) as server:
        client = HttpClient(server.base_url)
        await client.read("GET", "/")
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)  # in the turn in which the next one is written
        assert (await client.read("GET", "/"))[1] == b"y"
        client.close()


async def test_request_whose_answer_has_begun_is_not_repeated() -> None:
    scripts = iter([Script([b"first"]), Script([], raw=b"HTTP/1.1 200 "), Script([b"second"])])
    async with scripted_server(lambda _: next(scripts)) as server:
        client = HttpClient(server.base_url)
        await client.read("GET", "/")
        with pytest.raises(HttpError, match="before the end"):
            await client.read("GET", "/")
        client.close()
    assert len(server.requests) == 2


async def test_request_is_not_repeated_when_a_new_connection_is_closed_unanswered() -> None:
    async with scripted_server(lambda _: Script([], raw=b"")) as server:
        with pytest.raises(HttpError, match="before the end"):
            await HttpClient(server.base_url).read("GET", "/")
    assert len(server.requests) == 1


async def test_path_of_the_base_url_comes_before_the_request_path() -> None:
    async with scripted_server(lambda _: Script([])) as server:
        client = HttpClient(f"{server.base_url}/api/")
        await client.read("GET", "/v1/models", headers={"authorization": "Bearer k"})
        client.close()
    assert server.requests[0].path == "/api/v1/models"
    assert server.requests[0].headers["authorization"] == "bearer k"


async def test_body_may_end_with_the_connection() -> None:
    async with scripted_server(lambda _: Script([b"a", b"b"], is_chunked=False)) as server:
        client = HttpClient(server.base_url)
        assert (await client.read("GET", "/"))[1] == b"ab"
        client.close()


async def test_connection_that_ends_inside_the_body_is_an_error() -> None:
    async with scripted_server(lambda _: Script([b"a"], is_cut=True)) as server:
        client = HttpClient(server.base_url)
        with pytest.raises(HttpError, match="before the end"):
            await client.read("GET", "/")


async def test_answer_that_is_no_http_is_an_error() -> None:
    async with scripted_server(lambda _: Script([], raw=b"SSH-2.0-x\r\n")) as server:
        with pytest.raises(HttpError, match="unreadable"):
            await HttpClient(server.base_url).read("GET", "/")


async def test_refused_connection_names_the_address() -> None:
    with pytest.raises(HttpError, match=r"127.0.0.1:1:"):
        await HttpClient("http://127.0.0.1:1").read("GET", "/")


async def test_cancelled_request_closes_its_connection() -> None:
    async with scripted_server(lambda _: Script([b"a"], is_stuck=True)) as server:
        client = HttpClient(server.base_url)
        came = asyncio.Event()
        task = asyncio.ensure_future(client.request("GET", "/", on_body=lambda _: came.set()))
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client._idle == []


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://..:80", "http://[::1", "http://h:99999", "http://h:0"]
)
def test_base_url_without_scheme_host_and_port_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="base URL"):
        HttpClient(url)


async def test_what_cannot_stand_in_a_head_is_said() -> None:
    client = HttpClient("http://127.0.0.1:9")
    with pytest.raises(HttpError, match="'\u20ac' cannot stand in the head of a request"):
        await client.read("GET", "/", headers={"authorization": "Bearer \u20ac"})
