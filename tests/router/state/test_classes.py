"""Request classes: by which header, with which objectives, and what of a request goes before them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kvferry.common.errors import RequestError
from kvferry.common.router_config import RequestClass, RouterConfig
from kvferry.router.state.classes import RequestClasses
from kvferry.router.state.objectives import Objectives

from ..fakes import Served, serve

CLASSES = RequestClasses(
    Objectives(ttft_s=2.0),
    {
        "interactive": Objectives(ttft_s=0.5, tpot_s=0.04, priority=-1),
        "batch": Objectives(priority=10, deadline_s=600.0, weight=0.5),
    },
)


def config(**changes: object) -> RouterConfig:
    return RouterConfig(model_dir=Path("m"), served_model_name="m").model_copy(update=changes)


def test_a_class_has_what_its_entry_says_and_the_routers_stretch() -> None:
    entries = (
        RequestClass(name="interactive", ttft_objective_ms=500, tpot_objective_ms=40, ttft_stretch=2),
        RequestClass(name="batch", priority=10, deadline_s=600, weight=0.5),
    )
    classes = RequestClasses.from_config(
        config(ttft_objective_ms=900.0, tpot_objective_ms=80.0, ttft_stretch=4.0, classes=entries)
    )
    assert classes.names == ("default", "interactive", "batch")
    assert classes.named("default") == Objectives(0.9, 4.0, 0.08)
    assert classes.named("interactive") == Objectives(0.5, 2.0, 0.04)
    assert classes.named("batch") == Objectives(None, 4.0, None, 10, 600.0, 0.5)


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RequestError, match="there is no class 'intractive'; known: batch, default, interactive"
    ) as info:
        CLASSES.named("intractive")
    assert (info.value.status, info.value.param, info.value.code) == (400, "x-request-class", "unknown_request_class")


# --- through the API -------------------------------------------------------------------------------------------------


async def ask(served: Served, body: dict[str, object] | None = None, **headers: str) -> httpx.Response:
    async with served.client(**{name.replace("_", "-"): value for name, value in headers.items()}) as c:
        return await c.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2, **(body or {})})


async def test_a_request_picks_its_class_by_header() -> None:
    served = serve(classes=CLASSES)
    assert (await ask(served, x_request_class="interactive")).status_code == 200
    request = served.request
    assert (request.request_class, request.objectives, request.priority) == (
        "interactive", CLASSES.named("interactive"), -1,
    )  # fmt: skip
    await ask(served)
    assert (served.request.request_class, served.request.objectives.ttft_s) == ("default", 2.0)


async def test_what_a_request_says_itself_goes_before_its_class() -> None:
    served = serve(classes=CLASSES)
    await ask(served, {"priority": 3}, x_request_class="batch", x_request_timeout_s="5")
    assert served.request.priority == 3 and served.request.timeout_s == pytest.approx(5.0)
    await ask(served, x_request_class="batch", x_request_timeout_s="5000")
    assert served.request.priority == 10 and served.request.timeout_s == pytest.approx(600.0)


@pytest.mark.parametrize("name", ["nobodys", "", "Batch", "\u00e9"])
async def test_an_unknown_class_is_a_400_before_anything_else(name: str) -> None:
    served = serve(classes=CLASSES)
    async with served.client() as c:
        answer = await c.post(
            "/v1/completions", json={"prompt": "ab"}, headers=[(b"x-request-class", name.encode("latin-1"))]
        )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_request_class"
    assert not served.dispatcher.requests


# --- whose share it is -----------------------------------------------------------------------------------------------


async def test_a_key_is_a_tenant_whatever_it_says_of_its_users() -> None:
    served = serve(api_keys=("key-a", "key-b"))
    tenants = []
    for key, user in (("key-a", "u"), ("key-a", "v"), ("key-b", "u")):
        await ask(served, {"user": user}, authorization=f"Bearer {key}")
        tenants.append(served.request.tenant)
    assert tenants[0] == tenants[1] != tenants[2] and all(tenants)


async def test_without_keys_a_user_or_a_cache_salt_is_a_tenant() -> None:
    served = serve()
    tenants = []
    bodies: list[dict[str, object]] = [{}, {"user": "u"}, {"cache_salt": "u"}, {"user": "v"}, {"user": ["no", "text"]}]
    for body in bodies:
        assert (await ask(served, body)).status_code == 200
        tenants.append(served.request.tenant)
    assert tenants[0] == tenants[4] == "" and tenants[1] == tenants[2] != tenants[3]
    assert "u" not in (tenants[1], tenants[3])  # a name is not kept


async def test_labels_of_the_caller_are_still_taken_where_nothing_is_generated() -> None:
    served = serve()
    async with served.client() as c:
        answer = await c.post("/tokenize", json={"prompt": "ab", "user": "u"})
    assert answer.status_code == 200
