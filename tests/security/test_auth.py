"""Who may ask what: every route, every spelling of a path, every shape of a key; and what a key may use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from kvferry.common.errors import RequestError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool, hash_blocks, prefix_salt
from kvferry.router.access.keys import ApiKeys
from kvferry.router.access.quota import QuotaLimits
from kvferry.router.api.middleware import OPEN_PATHS
from kvferry.router.state.errors import StreamError

from ..router.fakes import Script, Served, listening, serve

KEYS = ("key-one", "key-two")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _paths(served: Served) -> Iterator[str]:
    """Of every route of the application, with its parameters filled in."""
    for route in served.app.routes:
        assert isinstance(route, (APIRoute, Route)), route  # a mount would hide routes from this walk
        yield route.path.replace("{name:path}", "toy").replace("{name}", "toy")


async def test_of_all_routes_only_the_probes_answer_without_a_key() -> None:
    served = serve(api_keys=KEYS)
    answered = set()
    async with served.client() as client:
        for path in _paths(served):
            for method in METHODS:
                response = await client.request(method, path)
                if response.status_code != 401:
                    answered.add(path)
                elif method != "HEAD":
                    error = response.json()["error"]
                    if path.startswith("/v1/messages"):  # in Anthropic's shape
                        assert error == {"type": "authentication_error", "message": "the API key is missing or wrong"}
                    else:
                        assert error["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
    assert answered == OPEN_PATHS == {"/live", "/ready", "/health", "/ping"}
    assert served.dispatcher.requests == []


@pytest.mark.parametrize(
    "path",
    ["/", "//", "/nope", "/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/admin", "/admin/workers",
     "/live/", "/ping/", "//live", "/live/../metrics", "/live%2f..%2fmetrics", "/%2e/metrics", "/LIVE", "/live;x=1",
     "/live%00",
     "/v1/models/..%2f..%2flive", "/health/../v1/models", "/live%20", "/live.json"],
)  # fmt: skip
async def test_every_other_spelling_of_a_path_needs_a_key(path: str) -> None:
    async with listening(serve(api_keys=KEYS).app) as address:
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            assert await _status(address, method, path) == 401, (method, path)


async def _status(address: str, method: str, path: str) -> int:
    """The path goes out as it stands: clients clean it up."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    status = int((await reader.read()).split(b" ", 2)[1])
    writer.close()
    return status


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "key-one", "Basic key-one", "Bearer key-on", "Bearer key-one2", "Bearer KEY-ONE",
     "Bearer key-one key-two", "Bearer key-one,key-two", "bearer\tkey-one", "Bearer " + "k" * 9000],
)  # fmt: skip
async def test_wrong_keys_get_one_answer(value: str) -> None:
    served = serve(api_keys=KEYS)
    async with served.client() as client:
        bodies = set()
        for headers in ({}, {"authorization": value}):
            response = await client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
            assert response.status_code == 401 and response.headers["x-should-retry"] == "false"
            bodies.add(response.content)
    assert len(bodies) == 1
    assert served.dispatcher.requests == []


async def test_each_key_is_right() -> None:
    async with serve(api_keys=KEYS).client() as client:
        for header in ("Bearer key-one", "bearer key-two", "BEARER   key-one"):
            assert (await client.get("/v1/models", headers={"authorization": header})).status_code == 200


async def test_wrong_keys_are_counted() -> None:
    served = serve(api_keys=KEYS)
    async with served.client() as client:
        for _ in range(3):
            await client.get("/v1/models", headers=_bearer("no"))
        text = (await client.get("/metrics", headers=_bearer("key-one"))).text
    assert "kvferry_auth_failures_total 3.0" in text


async def test_a_key_is_asked_for_before_the_body_is_read() -> None:
    async with listening(serve(api_keys=KEYS).app) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
        writer.close()


def test_of_a_key_only_salted_hashes_are_kept() -> None:
    first, second = ApiKeys(["sesame"]), ApiKeys(["sesame"])
    assert first._table.known.keys().isdisjoint(second._table.known)
    assert b"sesame" not in b"".join([*first._table.known, *(known.tenant for known in first._table.known.values())])
    assert first.check(b"Bearer sesame") == second.check(b"Bearer sesame")


def test_a_tenants_name_depends_on_the_key_and_the_secret() -> None:
    def name(key: str, secret: bytes) -> bytes:
        return ApiKeys([key], secret=secret).check(f"Bearer {key}".encode())

    names = {name(key, secret) for key in KEYS for secret in (b"", b"s", b"x" * 100)}
    assert len(names) == 6 and {len(each) for each in names} == {16}
    with pytest.raises(RequestError):
        ApiKeys(["a"]).check(b"Bearer b")


# --- tenants' prefixes --------------------------------------------------------------------------------------


async def _salt(served: Served, key: str | None, **fields: object) -> bytes:
    async with served.client(**(_bearer(key) if key else {})) as client:
        response = await client.post("/v1/completions", json={"prompt": "same prompt", **fields})
    assert response.status_code == 200, response.text
    return served.request.cache_salt


async def test_keys_do_not_find_each_others_prefixes() -> None:
    served = serve(api_keys=KEYS)
    one, two = await _salt(served, "key-one"), await _salt(served, "key-two")
    spec = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")
    pool, ids = BlockPool(8, 4), served.request.prompt_token_ids
    hashes = hash_blocks(ids, 4, prefix_salt(spec, one))
    for block, value in zip(pool.allocate(len(hashes)), hashes, strict=True):
        pool.publish(block, value)
    assert len(pool.match_prefix(hash_blocks(ids, 4, prefix_salt(spec, one)))) == len(hashes) == 2
    assert pool.match_prefix(hash_blocks(ids, 4, prefix_salt(spec, two))) == []


async def test_a_salt_of_the_client_adds_to_the_keys_and_never_replaces_it() -> None:
    served = serve(api_keys=KEYS)
    plain = await _salt(served, "key-one")
    assert await _salt(served, "key-one") == plain
    salted = [await _salt(served, key, cache_salt="team") for key in KEYS]
    forged = await _salt(served, "key-two", cache_salt=plain.decode("latin-1"))
    assert len({plain, *salted, forged}) == 4
    assert all(salt != b"team" for salt in salted)


async def test_keys_share_prefixes_where_the_operator_says_so() -> None:
    served = serve(api_keys=KEYS, share_prefix_cache=True)
    assert await _salt(served, "key-one") == await _salt(served, "key-two") == b""
    assert await _salt(served, "key-one", cache_salt="team") == await _salt(served, "key-two", cache_salt="team")
    assert await _salt(serve(), None) == b""


# --- what a key may use -------------------------------------------------------------------------------------


async def _ask(client: httpx.AsyncClient, key: str, **fields: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "hi", **fields}, headers=_bearer(key))


async def test_a_key_over_its_requests_is_told_when_to_come_back_and_the_others_go_on() -> None:
    served = serve(api_keys=KEYS, quota=QuotaLimits(requests_per_minute=2))
    async with served.client() as client:
        first = await _ask(client, "key-one")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"].endswith("s")
        assert (await _ask(client, "key-one")).status_code == 200
        refused = await _ask(client, "key-one")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-should-retry" not in refused.headers
        assert (await _ask(client, "key-two")).status_code == 200
        served.dispatcher.clock.advance(30.0)
        assert (await _ask(client, "key-one")).status_code == 200
        text = (await client.get("/metrics", headers=_bearer("key-one"))).text
    assert 'kvferry_rejections_total{reason="quota"} 1.0' in text


async def test_a_key_over_its_tokens_is_refused_before_the_dispatcher_hears_of_it() -> None:
    served = serve(Script("ab"), api_keys=KEYS, quota=QuotaLimits(tokens_per_minute=100))
    async with served.client() as client:
        for _ in range(5):  # 2 + 50 are charged, what was not generated is given back
            answer = await _ask(client, "key-one", max_tokens=50)
            assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        num = len(served.dispatcher.requests)
        assert (await _ask(client, "key-one", max_tokens=40, n=2)).status_code == 429
        assert len(served.dispatcher.requests) == num
        assert (await _ask(client, "key-two", max_tokens=40, n=2)).status_code == 200


async def test_a_key_does_not_pay_for_what_no_worker_has_got() -> None:
    late = StreamError("it waits too long", "rate_limit_exceeded", 429)
    script = Script("ab", fails_queued=True, error=late)
    served = serve(script, api_keys=KEYS, quota=QuotaLimits(tokens_per_minute=100))
    async with served.client() as client:
        for _ in range(3):
            refused = await _ask(client, "key-one", prompt="x" * 80, max_tokens=10)
            assert refused.status_code == 429 and "waits too long" in refused.json()["error"]["message"]
        script.fails_queued = False
        assert (await _ask(client, "key-one", prompt="x" * 80, max_tokens=10)).status_code == 200
        text = (await client.get("/metrics", headers=_bearer("key-one"))).text
    assert "kvferry_prompt_tokens_total 80.0" in text


async def test_a_key_may_have_so_many_requests_at_once() -> None:
    served = serve(Script("ab", hold_at=0), api_keys=KEYS, quota=QuotaLimits(max_concurrency=1))
    async with served.client() as client:
        running = asyncio.create_task(_ask(client, "key-one"))
        await served.dispatcher.held.wait()
        refused = await _ask(client, "key-one")
        assert refused.status_code == 429 and "at once" in refused.json()["error"]["message"]
        served.dispatcher.go.set()
        assert (await running).status_code == 200
        assert (await _ask(client, "key-one")).status_code == 200
        assert (await _ask(client, "key-one", nonsense=1)).status_code == 400
        assert (await _ask(client, "key-one")).status_code == 200


async def test_an_aborted_request_gives_its_place_back() -> None:
    served = serve(
        Script("ab", hold_at=1), api_keys=("k",), quota=QuotaLimits(max_concurrency=1, tokens_per_minute=100)
    )
    async with listening(served.app) as address, httpx.AsyncClient(base_url=f"http://{address}") as client:
        body = {"prompt": "hi", "stream": True, "max_tokens": 98}
        async with client.stream("POST", "/v1/completions", json=body, headers=_bearer("k")) as response:
            assert response.status_code == 200
        await served.dispatcher.abort_seen.wait()
        served.dispatcher.go.set()
        served.script.hold_at = None
        async with asyncio.timeout(60):
            while (await _ask(client, "k", max_tokens=90)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
