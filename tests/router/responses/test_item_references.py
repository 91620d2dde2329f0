"""References of /v1/responses to items of earlier answers, as the AI SDK of Vercel sends a turn that goes on."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvferry.router.access.keys import ApiKeys
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses.kept import MAX_BYTES_OF_ONE, KeptResponses
from kvferry.router.responses.store import FolderStore, MemoryStore
from kvferry.router.responses.surface import ResponsesSurface
from kvferry.tests.fake_clock import FakeClock

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events
from .backgrounds import call, router

TOOLS = [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}, "strict": False}]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
ASKED = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
BODY: dict[str, Any] = {"model": MODEL, "input": [ASKED], "tools": TOOLS}


def _served(**options: Any) -> Served:
    model = ServedModel(MODEL, 4096, VOCAB_SIZE, reasoning_parser="think")
    return serve(Script(f"<think>Hm.</think>Look.\n{CALL}"), model=model, **options)


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


async def _answer(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post("/v1/responses", json={**BODY, **fields})
    assert response.status_code == 200, response.text
    if fields.get("stream"):
        output: list[dict[str, Any]] = typed_events(response.text)[-1]["response"]["output"]
    else:
        output = response.json()["output"]
    return output


def _reference(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "item_reference", "id": item["id"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_referred", [2, 3])
async def test_items_of_an_earlier_answer_may_be_referred_to(stream: bool, num_referred: int) -> None:
    served = _served()
    async with served.client() as client:
        items = await _answer(client, stream=stream)
        assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
        result = {"type": "function_call_output", "call_id": items[2]["call_id"], "output": "found"}
        given = [*map(_reference, items[:num_referred]), *items[num_referred:]]
        await _answer(client, stream=stream, input=[ASKED, *given, result])
        referred = _prompt(served)
        await _answer(client, input=[ASKED, *items, result])
    assert _prompt(served) == referred and f"Look.\n{CALL}<user><tool_response>\nfound" in referred


async def test_what_is_not_kept_is_refused_by_its_place() -> None:
    served = _served(keys=ApiKeys(("key-1", "key-2")))
    async with served.client(authorization="Bearer key-1") as client:
        (mine, *_) = await _answer(client)
        (unstored, *_) = await _answer(client, store=False)
    async with served.client(authorization="Bearer key-2") as client:
        for item_id in (mine["id"], unstored["id"], f"{mine['id']}0", "", None, 5):
            body = {**BODY, "input": [ASKED, {"type": "item_reference", "id": item_id}]}
            response = await client.post("/v1/responses", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, "input[1]", "item_not_found")


def test_references_do_not_make_a_prompt_without_bounds() -> None:
    kept = KeptResponses(store := MemoryStore(FakeClock(0.0)))
    item = {"id": "rs_a_0", "type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 2**20}]}
    kept.keeper("resp_a", b"", [], [item])()
    assert store.num_bytes > 2**20
    reference, surface = _reference(item), ResponsesSurface(kept, b"", "id")
    surface.chat_body({"input": [reference] * 2}, None)
    with pytest.raises(Exception, match=rf"input\[3\]: items of more than {MAX_BYTES_OF_ONE} bytes"):
        surface.chat_body({"input": [reference] * 4096}, None)


class _Counted(MemoryStore):
    num_read = 0

    def read(self, name: str) -> memoryview | None:
        self.num_read += 1
        return super().read(name)


def test_an_answer_is_read_once_however_often_its_items_are_named() -> None:
    kept = KeptResponses(store := _Counted(FakeClock(0.0)))
    items = [{"id": f"rs_a_{at}", "type": "reasoning", "content": str(at)} for at in range(400)]
    kept.keeper("resp_a", b"", [], items)()
    body = ResponsesSurface(kept, b"", "id").chat_body({"input": [*map(_reference, items)] * 10}, None)
    assert store.num_read == 1
    thoughts = "\n".join([str(at) for at in range(400)] * 10)
    assert body["messages"] == [{"role": "assistant", "content": "", "reasoning_content": thoughts}]


async def test_more_items_than_messages_are_refused_before_any_is_looked_for() -> None:
    kept = KeptResponses(store := _Counted(FakeClock(0.0)))
    with pytest.raises(Exception, match="input: at most 4096 items, got 4097"):
        ResponsesSurface(kept, b"", "id").chat_body({"input": [_reference({"id": "rs_a_0"})] * 4097}, None)
    assert store.num_read == 0
    async with _served().client() as client:
        response = await client.post("/v1/responses", json={"input": [_reference({"id": "rs_a_0"})] * 4097})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "input")


async def test_the_loop_looks_for_no_items_and_reads_no_long_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def read(store: FolderStore, name: str) -> memoryview | None:
        readers.append(threading.current_thread().name)
        return found(store, name)

    found = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", read)
    served = router(tmp_path, model=ServedModel(MODEL, 60_000, VOCAB_SIZE))
    first = (await call(served, "POST", json={"input": "hi"})).json()
    long = (await call(served, "POST", json={"input": "x" * 50_000})).json()
    for fields in ({"input": [_reference(first["output"][0]), ASKED]}, {"previous_response_id": long["id"]}):
        assert (await call(served, "POST", json={"input": "more", **fields})).status_code == 200
        assert readers[-1].startswith("text")
    await call(served, "POST", json={"input": "more", "previous_response_id": first["id"]})
    assert readers[-1] == threading.main_thread().name


async def test_items_that_were_found_do_not_hold_all_of_their_answers(tmp_path: Path) -> None:
    kept = KeptResponses(FolderStore(tmp_path))
    names = [f"{number:032x}" for number in range(3)]
    for name in names:
        item = {"type": "message", "id": f"msg_{name}_0", "role": "assistant", "content": []}
        kept.keeper(f"resp_{name}", b"", [], [item], bytes(2**20), None)()
    tracemalloc.start()
    try:
        found = kept.find_items([f"msg_{name}_0" for name in names], b"")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == len(names) and held < 2**20
