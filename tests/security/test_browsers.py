"""What a web page in a user's browser may do to a server: nothing, unless an operator names its origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.common.router_config import RouterConfig
from kvferry.router.access.quota import QuotaLimits
from kvferry.router.kept.answers import KeptAnswers
from kvferry.settings.exposure import check_exposure
from kvferry.settings.fields import ServeSettings

from ..router.fakes import Script, serve

PAGE = "https://chat.example"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
OPEN = {"content-type", "content-length", "vary"}  # the first two are readable without being named
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


# --- names that lead here -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1",
             "evil@127.0.0.1", "kvferry.internal.evil", "*"],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/")])
async def test_a_server_without_keys_does_not_answer_to_a_strange_name(host: str, method: str, path: str) -> None:
    served = serve(Script("ab"), allowed_hosts=("kvferry.internal",))
    async with served.client() as client:
        answer = await client.request(method, path, json=CHAT, headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert served.dispatcher.requests == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "[::1]", "[::1]:8000", "localhost", "LOCALHOST:1",
             "kvferry.internal", "KVferry.Internal:443", "kvferry.internal.:443"],
)  # fmt: skip
async def test_addresses_localhost_and_given_names_are_right(host: str) -> None:
    async with serve(allowed_hosts=("KVferry.internal.",)).client() as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


async def test_probes_answer_under_any_name() -> None:
    async with serve(allowed_hosts=()).client() as client:
        assert (await client.get("/live", headers={"host": "probe.example"})).status_code == 200


async def test_with_keys_any_name_will_do_unless_names_are_given() -> None:
    key = {"authorization": "Bearer k", "host": "api.example"}
    async with serve(api_keys=("k",), allowed_hosts=()).client() as client:
        assert (await client.get("/v1/models", headers=key)).status_code == 200
    async with serve(api_keys=("k",), allowed_hosts=("other.example",)).client() as client:
        assert (await client.get("/v1/models", headers=key)).status_code == 403


async def test_the_root_says_what_there_is() -> None:
    async with serve().client() as client:
        answer = await client.get("/")
        paths = answer.json()["paths"]
        assert "/v1/chat/completions" in paths and "\n" not in answer.text
        for path in paths:
            assert (await client.get(path)).status_code in (200, 405, 503), path


# --- pages of other origins ---------------------------------------------------------------------------------


async def test_without_origins_a_preflight_is_a_method_that_does_not_exist() -> None:
    async with serve(Script("ab")).client() as client:
        answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status_code == 405
        plain = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": PAGE})
    assert not [name for name in [*answer.headers, *plain.headers] if name.startswith("access-control-")]


async def test_a_preflight_of_an_allowed_page_is_answered_before_keys() -> None:
    async with serve(api_keys=("k",), allowed_origins=(PAGE,)).client() as client:
        answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        for method, headers in (("POST", PREFLIGHT), ("OPTIONS", {"origin": PAGE})):  # nothing else is one
            assert (await client.request(method, "/v1/chat/completions", headers=headers)).status_code == 401
    assert answer.status_code == 204 and answer.content == b""
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-max-age"] == "600"
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", f"{PAGE}.evil", PAGE.replace("https", "http"), "null", ""])
async def test_another_page_is_refused_and_can_read_nothing(origin: str) -> None:
    served = serve(Script("ab"), allowed_origins=(PAGE,))
    async with served.client() as client:
        answer = await client.options("/v1/chat/completions", headers={**PREFLIGHT, "origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
        plain = await client.get("/v1/models", headers={"origin": origin})
    assert not [name for name in [*answer.headers, *plain.headers] if name.startswith("access-control-")]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_allowed_page_reads_the_answer_and_what_stands_in_its_head(stream: bool) -> None:
    served = serve(Script("ab"), api_keys=("k",), allowed_origins=(PAGE,))
    headers = {"origin": PAGE, "authorization": "Bearer k"}
    async with served.client() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers)
        refused = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": PAGE})
    assert (answer.status_code, refused.status_code) == (200, 401)
    for each in (answer, refused):  # a page must be able to read why it was refused
        assert each.headers["access-control-allow-origin"] == PAGE
        exposed = set(each.headers["access-control-expose-headers"].split(", "))
        assert {"x-request-id", "server-timing", "retry-after", "x-ratelimit-remaining-tokens"} <= exposed


async def test_a_page_can_read_every_header_that_says_something_of_an_answer(tmp_path: Path) -> None:
    limits, kept = QuotaLimits(None, 2, 10_000), KeptAnswers(tmp_path)
    served = serve(Script("ab"), api_keys=("k",), allowed_origins=(PAGE,), quota=limits, kept_answers=kept)
    headers = {"origin": PAGE, "authorization": "Bearer k"}
    named = headers | {"idempotency-key": "a"}
    async with served.client() as client:
        answers = [await client.post("/v1/chat/completions", json=CHAT, headers=named) for _ in range(2)]
        answers.append(await client.post("/v1/messages", json={}, headers=headers))
        answers.append(await client.post("/v1/chat/completions", json=CHAT, headers=headers))
    assert [each.status_code for each in answers] == [200, 200, 400, 429]
    assert {"idempotent-replayed", "x-should-retry", "retry-after-ms"} <= {
        name for each in answers for name in each.headers
    }
    for each in answers:
        exposed = set(each.headers["access-control-expose-headers"].split(", "))
        assert {name for name in each.headers if not name.startswith("access-control-")} <= exposed | OPEN


async def test_every_page_may_ask_a_server_with_keys_that_says_so() -> None:
    async with serve(api_keys=("k",), allowed_origins=("*",)).client() as client:
        answer = await client.options("/v1/models", headers=PREFLIGHT)
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("names", ["x-a\r\nset-cookie: b", "x" * 5000, "", "x-ä"])
async def test_what_a_preflight_asks_for_is_repeated_only_where_it_is_names(names: str) -> None:
    headers = [(name, value) for name, value in PREFLIGHT.items() if not name.endswith("headers")]
    raw = [(name.encode(), value.encode()) for name, value in headers]
    raw.append((b"access-control-request-headers", names.encode()))
    async with serve(allowed_origins=(PAGE,)).client() as client:
        answer = await client.options("/v1/models", headers=raw)
    assert answer.headers["access-control-allow-headers"] == "authorization"


class Adapters:
    """Notes what is loaded and unloaded."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    async def load(self, name: str, path: str, *, in_place: bool, base: str | None = None) -> None:
        self.orders.append(f"+{name}")

    async def unload(self, name: str) -> None:
        self.orders.append(f"-{name}")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_page_changes_no_adapter_with_what_it_may_send_unasked(kind: str) -> None:
    adapters = Adapters()
    headers = {"origin": PAGE, "content-type": kind} if kind else {"origin": PAGE}
    async with serve(adapters=adapters).client() as client:
        for order in ("load", "unload"):
            body = b'{"lora_name": "a", "lora_path": "/a"}' if order == "load" else b'{"lora_name": "a"}'
            path = f"/v1/{order}_lora_adapter"
            answer = await client.post(path, content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
            for wrong in (b"[" * 4000, b'{"lora_name": "a", "lora_path": "\\ud800"}'):
                assert (await client.post(path, content=wrong, headers=JSON)).status_code == 400
            assert (await client.post(path, content=b" " * 5000, headers=JSON)).status_code == 413
            assert not adapters.orders[order == "unload" :]
            assert (await client.post(path, content=body, headers=JSON)).status_code == 200
    assert adapters.orders == ["+a", "-a"]


def test_all_origins_need_keys_and_an_origin_has_no_path(model: RouterConfig) -> None:
    with pytest.raises(ConfigError, match=r"^allowed_origins: \*"):
        check_exposure(model.model_copy(update={"allowed_origins": ("*",)}), has_secret=True)
    check_exposure(model.model_copy(update={"allowed_origins": ("*",), "api_key": ("k",)}), has_secret=True)
    for wrong in ("chat.example", "https://chat.example/", "https://", "**", "https://a b"):
        with pytest.raises(ValueError, match="is no origin"):
            ServeSettings.model_validate({"allowed_origins": [wrong]})
    for right in ("*", PAGE, "http://localhost:3000", "tauri://localhost", "chrome-extension://abcdef"):
        assert ServeSettings.model_validate({"allowed_origins": right}).allowed_origins == (right,)


@pytest.fixture
def model() -> RouterConfig:
    return RouterConfig.model_validate({"model_dir": "/", "served_model_name": "m"})
