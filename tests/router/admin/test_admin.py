"""The admin listener: who may ask, what it says, what it orders."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.routing import Route
from starlette.types import Message

from kvferry.router.access.keys import ApiKeys
from kvferry.router.admin import json_body
from kvferry.router.admin.adapters import LOAD_PATH, UNLOAD_PATH, adapter_routes
from kvferry.router.admin.admin import Admin, build_admin
from kvferry.router.admin.scaling import scaling_routes
from kvferry.router.autoscaler.scale_types import Counts
from kvferry.router.state.history import Kind
from kvferry.router.state.views import PoolView
from kvferry.wire.workers import ExpertCounts

from ..fleet import Fleet

KEY = "operators-only"
PATHS = [
    ("GET", "/admin/metrics"),
    ("GET", "/admin/workers"),
    ("GET", "/admin/experts"),
    ("GET", "/admin/requests"),
    ("GET", "/admin/requests/r-0"),
    ("POST", "/admin/workers/d-0/drain"),
    ("POST", "/admin/restart"),
    ("GET", "/other"),
]


class Launcher:
    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []

    def send(self, event: Mapping[str, object]) -> None:
        self.events.append(dict(event))


class Operations:
    """The dispatcher, as the listener sees it."""

    def __init__(self, view: PoolView) -> None:
        self.pools = view
        self.drained: list[tuple[str, float]] = []

    def view(self) -> PoolView:
        return self.pools

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool:
        self.drained.append((worker_id, deadline_s))
        return any(worker.worker_id == worker_id for worker in self.pools.workers)

    def requests(self, kind: Kind, request_class: str | None, limit: int) -> list[dict[str, object]]:
        return [{"kind": kind, "class": request_class, "limit": limit}]

    def request(self, request_id: str) -> dict[str, object] | None:
        return {"request_id": "known"} if request_id == "known" else None


def operations() -> Operations:
    fleet = Fleet()
    fleet.join("p-0")
    fleet.join("d-0")
    fleet.beat(fleet.join("d-1"), state="starting")
    return Operations(fleet.dispatcher.view())


def client(
    dispatcher: Operations, keys: tuple[str, ...] = (), launcher: Launcher | None = None, **headers: str
) -> httpx.AsyncClient:
    operations = Admin([dispatcher], lambda: lambda: (b"kvferry_x 1\n", "text/plain"), 30.0, launcher)
    app = build_admin(operations, ApiKeys(keys))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9", headers=headers)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("authorization", ["", "Bearer other", f"Basic {KEY}"])
async def test_nothing_is_told_without_the_key(method: str, path: str, authorization: str) -> None:
    dispatcher, launcher = operations(), Launcher()
    headers = {"authorization": authorization} if authorization else {}
    async with client(dispatcher, (KEY,), launcher, **headers) as c:
        answer = await c.request(method, path)
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert not dispatcher.drained and not launcher.events


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"host": "evil.example:9"}, {"host": ""}])
async def test_a_web_page_cannot_ask_a_listener_that_has_no_key(headers: dict[str, str]) -> None:
    launcher = Launcher()
    async with client(operations(), (), launcher) as c:
        answer = await c.post("/admin/restart", headers=headers)
    assert answer.status_code == 403 and error_of(answer)["code"] == "forbidden"
    assert not launcher.events


async def test_whose_request_it_is_and_for_whom_is_not_guessed() -> None:
    async with client(operations()) as c:
        answer = await c.get("/admin/workers", headers=[("host", "evil.example"), ("host", "127.0.0.1:9")])
    assert answer.status_code == 400 and "more than one host" in error_of(answer)["message"]


async def test_a_router_that_is_ending_asks_for_no_restart() -> None:
    launcher = Launcher()
    ending = Admin([operations()], lambda: lambda: (b"", ""), 30.0, launcher, lambda: True)
    transport = httpx.ASGITransport(build_admin(ending, ApiKeys()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9") as c:
        answer = await c.post("/admin/restart")
    assert answer.status_code == 409 and error_of(answer)["code"] == "shutting_down"
    assert not launcher.events


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost:9", "[::1]:9", "localhost"])
async def test_the_operator_of_this_machine_may(host: str) -> None:
    async with client(operations(), host=host) as c:
        assert (await c.get("/admin/workers")).status_code == 200


async def test_workers_are_shown_with_their_state_load_and_blocks() -> None:
    dispatcher = operations()
    sessions = {worker.worker_id: worker.session for worker in dispatcher.pools.workers}
    pair = (sessions["p-0"], sessions["d-0"])
    dispatcher.pools = replace(dispatcher.pools, avoided_pairs=frozenset({pair}), num_queued=3)
    async with client(dispatcher, (KEY,), authorization=f"Bearer {KEY}") as c:
        shown = (await c.get("/admin/workers")).json()
    assert [(worker["worker_id"], worker["role"], worker["state"]) for worker in shown["workers"]] == [
        ("p-0", "prefill", "ready"),
        ("d-0", "decode", "ready"),
        ("d-1", "decode", "starting"),
    ]
    assert shown["workers"][0]["blocks"]["total"] == 64
    assert shown["workers"][0]["load"]["running"] == 0
    assert shown["avoided_handoffs"] == [["p-0", "d-0"]]
    assert shown["queued_requests"] == 3


async def test_experts_are_shown_by_worker_and_layer() -> None:
    fleet = Fleet()
    link = fleet.join("d-0", tp_size=2)
    fleet.join("d-1")
    for taken in ((1, 1), (4, 2)):
        fleet.beat(link, experts=(ExpertCounts(3, taken, taken),))
    fleet.beat(link)
    async with client(Operations(fleet.dispatcher.view())) as c:
        [shown] = (await c.get("/admin/experts")).json()["workers"]
        workers = (await c.get("/admin/workers")).json()["workers"]
    assert shown == {
        "worker_id": "d-0",
        "role": "decode",
        "ranks": 2,
        "imbalance": 1.5,
        "rank_imbalance": 1.5,
        "layers": [{"layer": 3, "taken": [4, 2], "recently_taken": [3, 1], "of_ranks": [4, 2]}],
    }
    assert [worker.get("experts") for worker in workers] == [{"imbalance": 1.5, "rank_imbalance": 1.5}, None]


async def test_a_worker_is_drained_within_the_limit_that_is_asked_for() -> None:
    dispatcher = operations()
    async with client(dispatcher) as c:
        answer = await c.post("/admin/workers/d-0/drain", json={"timeout_s": 2})
        assert (answer.status_code, answer.json()["state"]) == (202, "draining")
        assert (await c.post("/admin/workers/d-0/drain")).json()["timeout_s"] == 30.0
        missing = await c.post("/admin/workers/d-9/drain")
    assert dispatcher.drained[:2] == [("d-0", 2.0), ("d-0", 30.0)]
    assert missing.status_code == 404 and error_of(missing)["code"] == "worker_not_found"


@pytest.mark.parametrize(
    "body",
    [b"[]", b"[" * 4000, b"{", b'{"timeout": 1}', b'{"timeout_s": -1}', b'{"timeout_s": true}', b'{"timeout_s": 1e9}'],
)
async def test_a_wrong_body_is_refused(body: bytes) -> None:
    dispatcher = operations()
    async with client(dispatcher) as c:
        answer = await c.post("/admin/workers/d-0/drain", content=body)
    assert answer.status_code == 400 and error_of(answer)["message"]
    assert not dispatcher.drained


class Orders:
    """Takes what is ordered of adapters and of scaling."""

    def __init__(self) -> None:
        self.taken: list[tuple[object, ...]] = []

    async def load(self, *order: object, **fields: object) -> None:
        self.taken.append((*order, *fields.values()))

    async def unload(self, name: str) -> None:
        self.taken.append((name,))

    def hold(self, counts: Counts, for_s: float | None) -> None:
        self.taken.append((counts.prefill, counts.decode, for_s))


LOAD = {"lora_name": "a", "lora_path": "/a"}


@pytest.mark.parametrize(
    ("path", "body", "wrong", "taken"),
    [
        (LOAD_PATH, LOAD, "", ("a", "/a", False, None)),
        (LOAD_PATH, {**LOAD, "load_inplace": True, "base_model_name": "b"}, "", ("a", "/a", True, "b")),
        (LOAD_PATH, {**LOAD, "lora_name": ""}, "lora_name", ()),
        (LOAD_PATH, {**LOAD, "lora_path": 1}, "lora_path", ()),
        (LOAD_PATH, {**LOAD, "load_inplace": 1}, "load_inplace", ()),
        (LOAD_PATH, {**LOAD, "base_model_name": 1}, "base_model_name", ()),
        (UNLOAD_PATH, {"lora_name": "a"}, "", ("a",)),
        (UNLOAD_PATH, None, "lora_name", ()),
        ("/admin/scaling", {"prefill": 0, "decode": 1}, "", (0, 1, None)),
        ("/admin/scaling", {"prefill": 0, "decode": True}, "decode", ()),
        ("/admin/scaling", {"prefill": -1, "decode": 1}, "prefill", ()),
        ("/admin/scaling", {"prefill": 0, "decode": 1, "for_s": True}, "for_s", ()),
        ("/admin/scaling", {"prefill": 0, "decode": 1, "for_s": 0}, "for_s", ()),
        ("/admin/scaling", {"z": 0, "y": 1}, "y", ()),
    ],
)
async def test_an_order_is_taken_as_it_is_or_refused_by_its_field(
    path: str, body: dict[str, object] | None, wrong: str, taken: tuple[object, ...]
) -> None:
    orders = Orders()
    more = [*adapter_routes(orders), *scaling_routes(orders)]  # type: ignore[arg-type]
    app = build_admin(Admin([operations()], lambda: lambda: (b"", ""), 1.0, None), ApiKeys(), more)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as c:
        answer = await c.post(path, json=body) if body is not None else await c.post(path)
    assert orders.taken == ([taken] if taken else [])
    assert answer.is_success if taken else error_of(answer)["param"] == wrong


async def test_a_long_body_is_not_read() -> None:
    async with client(operations()) as c:
        answer = await c.post("/admin/workers/d-0/drain", content=b" " * 5000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(("leaves", "status"), [(True, 499), (False, 408)])
async def test_a_body_that_does_not_come_holds_nothing(
    leaves: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "BODY_TIMEOUT_S", 0.01)
    parts: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not parts and not leaves:
            await asyncio.Event().wait()
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    dispatcher = operations()
    app = build_admin(Admin([dispatcher], lambda: lambda: (b"", ""), 1.0, None), ApiKeys())
    path, headers = "/admin/workers/d-0/drain", [(b"host", b"127.0.0.1:9")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == status
    assert not dispatcher.drained


async def test_a_restart_is_the_launchers() -> None:
    launcher = Launcher()
    async with client(operations(), (), launcher) as c:
        assert (await c.post("/admin/restart")).status_code == 202
    assert launcher.events == [{"event": "restart_all"}]
    async with client(operations()) as c:
        alone = await c.post("/admin/restart")
    assert alone.status_code == 409 and error_of(alone)["code"] == "no_launcher"


async def test_metrics_are_this_routers() -> None:
    async with client(operations()) as c:
        assert (await c.get("/admin/metrics")).text == "kvferry_x 1\n"


async def test_other_paths_and_methods_are_refused_in_the_same_shape() -> None:
    async with client(operations()) as c:
        unknown, wrong = await c.get("/v1/models"), await c.get("/admin/restart")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert error_of(unknown)["code"] == "unknown_url"
    assert error_of(wrong)["code"] == "method_not_allowed"
    assert unknown.headers.get("allow") is None and wrong.headers["allow"] == "POST"


async def test_a_wrong_method_is_told_all_that_the_path_has() -> None:
    more = [Route("/admin/scaling", lambda request: None, methods=[method]) for method in ("GET", "POST", "DELETE")]
    app = build_admin(Admin([operations()], lambda: lambda: (b"", ""), 1.0, None), ApiKeys(), more)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as c:
        wrong = await c.put("/admin/scaling")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "DELETE, GET, HEAD, POST"


# --- requests --------------------------------------------------------------------------------------------------------


async def test_requests_are_listed_by_kind_and_class() -> None:
    async with client(operations()) as c:
        assert (await c.get("/admin/requests")).json() == {
            "requests": [{"kind": "recent", "class": None, "limit": 100}]
        }
        answer = await c.get("/admin/requests?kind=slowest&class=batch&limit=7")
    assert answer.json() == {"requests": [{"kind": "slowest", "class": "batch", "limit": 7}]}


@pytest.mark.parametrize(
    "query",
    [
        "kind=all",
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=%EF%BC%95",
        "since=1",
        f"limit={'1' * 5000}",  # Python reads no number of so many digits
    ],
)
async def test_a_wrong_question_about_requests_is_a_400_that_names_it(query: str) -> None:
    async with client(operations()) as c:
        answer = await c.get(f"/admin/requests?{query}")
    assert answer.status_code == 400 and error_of(answer)["param"] == query.partition("=")[0]


async def test_one_request_is_told_and_an_unknown_one_is_a_404() -> None:
    async with client(operations()) as c:
        assert (await c.get("/admin/requests/known")).json() == {"request_id": "known"}
        answer = await c.get("/admin/requests/other")
    assert answer.status_code == 404 and error_of(answer)["code"] == "request_not_found"
