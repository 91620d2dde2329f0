"""/v1/files and /v1/batches as OpenAI's clients call them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from ...common.errors import CapacityError, RequestError
from ..api.body import BodyRoom, read_body
from ..api.json_answers import Json, listed, ordered, page_of
from ..api.middleware import context_of
from ..kept.asking import REPEATED_HEADER, key_name, key_reused
from .content import content
from .creation import new_record
from .files import INPUT
from .folder import Room
from .keeper import Keeper
from .record import BatchRecord
from .run import RunDeps
from .upload import received

MAX_UNENDED = 100  # batches of one owner that have not ended
_MAX_BODY_BYTES = 64 * 2**10
_MAX_FILES, _MAX_BATCHES, _BATCHES_SHOWN = 10_000, 100, 20  # of a page, as OpenAI's


class BatchRoutes:
    """The endpoints. Without a data folder each says which flag gives one."""

    def __init__(
        self,
        deps: RunDeps | None,
        *,
        endpoints: Sequence[str],
        model: str | None,
        owner_of: Callable[[bytes], str],
        body_room: BodyRoom,
        check_form: Callable[[Mapping[bytes, bytes]], None],
    ) -> None:
        """`model`: what batches that are taken here are for. `owner_of`: a tenant's name on disk.

        `check_form`: refuses forms of web pages that may not ask.
        """
        self._check_form = check_form
        self._model = model
        self._deps = deps
        self.keeper = Keeper(deps) if deps is not None else None
        self._endpoints = endpoints
        self._owner_of = owner_of
        self._body_room = body_room

    @property
    def _ready(self) -> RunDeps:
        if self._deps is None:
            raise RequestError(
                "files and batches need a folder on the server: start it with --data-dir DIR",
                code="no_data_dir",
                status=501,
                kind="server_error",
            )
        return self._deps

    def _owner(self, request: Request) -> str:
        return self._owner_of(context_of(request.scope).tenant)

    # --- files ----------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        deps, owner = self._ready, self._owner(request)
        headers = context_of(request.scope).headers
        self._check_form(headers)
        async with received(headers, request.receive, deps.store.folder) as (form, part):
            lifetime_s = form.check()
            assert form.filename is not None
            stored = await asyncio.to_thread(
                deps.files.add, part, owner=owner, filename=form.filename, purpose=INPUT, lifetime_s=lifetime_s
            )
        return Json(stored.shown())

    async def files(self, request: Request) -> Response:
        deps, query = self._ready, request.query_params
        found = ordered(await asyncio.to_thread(deps.files.owned, self._owner(request), query.get("purpose")), query)
        page, has_more = page_of(found, [each.id for each in found], query, usual=_MAX_FILES, most=_MAX_FILES)
        return listed([(each.id, each.shown()) for each in page], has_more=has_more)

    async def file(self, request: Request, file_id: str) -> Response:
        stored = await asyncio.to_thread(self._ready.files.get, file_id, self._owner(request))
        return Json(stored.shown())

    async def content(self, request: Request, file_id: str) -> Response:
        files = self._ready.files
        stored = await asyncio.to_thread(files.get, file_id, self._owner(request))
        return content(files.path(stored), stored)

    async def delete(self, request: Request, file_id: str) -> Response:
        await asyncio.to_thread(self._ready.files.delete, file_id, self._owner(request))
        return Json({"id": file_id, "object": "file", "deleted": True})

    # --- batches --------------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        deps, owner = self._ready, self._owner(request)
        with self._body_room.held() as held:
            headers = context_of(request.scope).headers
            data = await read_body(headers, request.receive, held, max_bytes=_MAX_BODY_BYTES)
            raw = await deps.json.parse(data)
        name = key_name(headers, context_of(request.scope).tenant)
        record = new_record(raw, self._endpoints, owner, deps.now_s(), self._model, name, deps.life)
        room = Room(deps.store.folder)
        known = await asyncio.to_thread(self._create, deps, record, room)
        assert self.keeper is not None
        self.keeper.look_now()
        response = Json((known or record).shown())
        if known is not None:
            response.raw_headers.append(REPEATED_HEADER)
        return response

    def _create(self, deps: RunDeps, record: BatchRecord, room: Room) -> BatchRecord | None:
        """Return the batch that an earlier try of the same request has made; None: it is made now.

        `room`: of this moment, to be measured where nobody knows of any.
        """
        if (known := _made_before(deps, record)) is not None:
            return known
        stored = deps.files.get(record.input_file_id, record.owner, "input_file_id")
        if stored.purpose != INPUT:
            raise RequestError(
                f"input_file_id: the file's purpose is {stored.purpose}, not {INPUT}", param="input_file_id"
            )
        if deps.store.num_unended(record.owner) >= MAX_UNENDED:
            raise CapacityError(f"{MAX_UNENDED} batches have not ended yet", retry_after_s=60.0)
        known_room = deps.store.folder.room
        if known_room is None or known_room.is_used_up:
            room.measure()
            if room.is_used_up:
                raise room.refusal()
        try:
            deps.store.create(record, deps.files.path(stored))
        except FileNotFoundError:  # it was deleted in this moment
            deps.files.get(record.input_file_id, record.owner, "input_file_id")
            raise
        except OSError:
            if (known := _made_before(deps, record)) is None:
                raise
            return known  # another try made it in this moment
        return None

    async def batches(self, request: Request) -> Response:
        deps, query = self._ready, request.query_params
        found = await asyncio.to_thread(deps.store.owned, self._owner(request))
        page, has_more = page_of(found, [each.id for each in found], query, usual=_BATCHES_SHOWN, most=_MAX_BATCHES)
        return listed([(record.id, await self._shown(record)) for record in page], has_more=has_more)

    async def batch(self, request: Request, batch_id: str) -> Response:
        record = await asyncio.to_thread(self._ready.store.get, batch_id, self._owner(request))
        return Json(await self._shown(record))

    async def cancel(self, request: Request, batch_id: str) -> Response:
        record = await asyncio.to_thread(self._ready.store.ask_to_cancel, batch_id, self._owner(request))
        assert self.keeper is not None
        self.keeper.look_now()
        return Json(await self._shown(record))

    async def _shown(self, record: BatchRecord) -> dict[str, object]:
        asked_s = await asyncio.to_thread(self._ready.store.cancel_asked_s, record.id)
        return record.shown(asked_s)

    def table(self) -> list[tuple[str, str, Callable[..., object]]]:
        """Return (method, path, endpoint) of each."""
        return [
            ("POST", "/v1/files", self.upload),
            ("GET", "/v1/files", self.files),
            ("GET", "/v1/files/{file_id}", self.file),
            ("DELETE", "/v1/files/{file_id}", self.delete),
            ("GET", "/v1/files/{file_id}/content", self.content),
            ("POST", "/v1/batches", self.create),
            ("GET", "/v1/batches", self.batches),
            ("GET", "/v1/batches/{batch_id}", self.batch),
            ("POST", "/v1/batches/{batch_id}/cancel", self.cancel),
        ]


def _made_before(deps: RunDeps, record: BatchRecord) -> BatchRecord | None:
    """Return the batch of this id, if there is one. Raises RequestError where another request has made it."""
    known = deps.store.read(record.id)
    if known is not None and not known.asks_like(record):
        raise key_reused()
    return known
