"""`kvferry explain` against a real admin listener: what it prints, and how it fails."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from rich.console import Console

from kvferry.common.errors import KVFerryError
from kvferry.router.access.keys import ApiKeys
from kvferry.router.admin.admin import Admin, build_admin
from kvferry.router.admin.explain_view import fetch, fetch_first, list_path, path_of, show, show_list
from kvferry.router.http.http_server import HttpServer
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address
from kvferry.wire.tasks import PrefillTask

from ..fleet import Fleet, config, tokens
from ..placement.test_candidates import SAMPLES


@asynccontextmanager
async def listener(fleet: Fleet, keys: tuple[str, ...] = ()) -> AsyncIterator[str]:
    sock = listen(Address("127.0.0.1", 0))
    app = build_admin(Admin([fleet.dispatcher], lambda: lambda: (b"", "text/plain"), 30.0, None), ApiKeys(keys))
    async with HttpServer(app).serving(sock):
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


async def printed(address: str, path: str, key: str = "") -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    known = await asyncio.to_thread(fetch, address, path, key)
    if "requests" in known:
        show_list(console, known["requests"])
    else:
        show(console, known)
    return console.export_text()


def served_fleet() -> Fleet:
    """One answered request and one that waits."""
    fleet = Fleet(
        config(explain=True, policy="slo", local_prefill=False, tpot_objective_ms=50.0, ttft_objective_ms=99.0)
    )
    p, d = fleet.join("p-0", samples=SAMPLES), fleet.join("d-0", samples=SAMPLES)
    fleet.join("d-1", num_blocks=1)
    fleet.submit(40)
    fleet.clock.advance(0.05)
    fleet.grant(d)
    fleet.clock.advance(0.2)
    task = p.take(PrefillTask)
    fleet.first_token(p, task)
    fleet.arrived(d, task)
    fleet.clock.advance(0.07)
    fleet.step(d, task, tokens(0, 1, 7, "length"))
    return fleet


async def test_a_request_is_shown_with_its_times_its_phases_and_its_candidates() -> None:
    async with listener(served_fleet()) as address:
        text = await printed(address, path_of("r-0"))
    lines = [line.rstrip() for line in text.splitlines()]
    assert any(line.startswith("request") and line.endswith("r-0, class default, priority 0") for line in lines)
    assert any(line.split()[:2] == ["TTFT", "250.0"] and line.endswith("119.8") for line in lines)  # 3 x 40 ms
    assert any(line.split()[:2] == ["TPOT", "10.0"] and line.endswith("50.0") for line in lines)
    assert "finished, missed: reply" in text and "* spent most of the time in excess" in text
    assert "Attempt 0 at 0.0 ms: p-0 -> d-0 by slo (handoff)" in text
    assert any(line.startswith("p-0 -> d-0") and line.endswith("chosen") for line in lines)
    assert any(line.startswith("d-1") and line.endswith("too_small") for line in lines)


async def test_requests_are_listed() -> None:
    async with listener(served_fleet()) as address:
        text = await printed(address, list_path("slowest"))
    assert "r-0" in text and "p-0 -> d-0" in text and "250.0" in text


async def test_an_operators_key_goes_to_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with listener(served_fleet(), ("key",)) as address:
        assert (await asyncio.to_thread(fetch, address, path_of("r-0"), "key"))["request_id"] == "r-0"


async def test_of_several_routers_the_one_is_found_that_knows_a_request() -> None:
    async with listener(Fleet()) as other, listener(served_fleet()) as address:
        for admins in ([other, address], [address, other], ["http://127.0.0.1:9", address]):
            assert (await asyncio.to_thread(fetch_first, admins, path_of("r-0"), ""))["request_id"] == "r-0"
        with pytest.raises(KVFerryError, match="is not under way here") as told:
            await asyncio.to_thread(fetch_first, [other, address], path_of("r-9"), "")
        assert str(told.value).count("not under way") == 1


async def test_what_goes_wrong_is_said_in_the_listeners_words() -> None:
    async with listener(served_fleet(), ("key",)) as address:
        for path, key, why in (
            (path_of("r 9"), "key", "is not under way here"),
            (path_of("r-0"), "other", "the API key is missing or wrong"),
            (list_path("all"), "key", "is none of recent, slowest, failed"),
        ):
            with pytest.raises(KVFerryError, match=why):
                await asyncio.to_thread(fetch, address, path, key)
        assert (await asyncio.to_thread(fetch, f"{address}/", path_of("r-0"), "key"))["request_id"] == "r-0"
    with pytest.raises(KVFerryError, match="no answer from"):
        fetch(address, path_of("r-0"), "")
    # A port beyond 65535 would be asked as another one, with an operator's key.
    for admin in ("file:///etc/passwd", "..:80", "http://[::1", "127.0.0.1:99999", "127.0.0.1:1 x"):
        with pytest.raises(KVFerryError, match="no HTTP address"):
            fetch(admin, "", "")
