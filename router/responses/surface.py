"""/v1/responses: OpenAI's newer surface of a chat. Stateless but for what `kept.py` keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ...common.errors import RequestError
from ..api.chat_turns import ChatTurns
from ..api.events import encode_typed
from ..api.form import Form, FormContext
from ..api.prompts import ChatPrompt
from ..api.surface import renamed
from ..bodies.chat_messages import MAX_MESSAGES
from ..bodies.schemas import ChatBody
from ..kept.asking import own_key
from ..kept.kept_answer import AnswerKey
from ..state.errors import shown
from ..turns.places import Message, Places
from .conversation import Asked, Earlier, joined_arrays
from .form import BEGINNING, Fields, ResponseForm, event_format
from .items import check_num_items
from .kept import MAX_BYTES_OF_ONE, RESPONSE_PREFIX, KeptResponses, ids_of, response_name, too_long
from .listed import has_own_ids, listed
from .tools import Names, ResponseTools, names_of_calls, response_tools
from .translate import FIELD_NAMES, chat_body

PATH = "/v1/responses"


class ResponsesSurface:
    """Translates one call."""

    id_prefix = RESPONSE_PREFIX
    key: AnswerKey | None = None  # of a background response

    def __init__(
        self,
        kept: KeptResponses,
        tenant: bytes,
        request_id: str,
        *,
        keeps: bool = True,
        goes_on: bool = False,
        num_told: int = 0,
    ) -> None:
        """`keeps`: the answer, unless the request says otherwise. A batch's many would drive others' out.

        `goes_on`: an answer may be computed for a client that does not wait for it. `num_told`: events of it that an
        earlier run has told.
        """
        self._request_id = request_id
        self._goes_on = goes_on
        self._num_told = num_told
        self._kept = kept
        self._tenant = tenant
        self._keeps = keeps
        self._raw: Mapping[str, object] = {}
        self._messages: Sequence[Message] = ()  # without instructions, which hold for one call
        self._input: object = None  # with items in place of references
        self._earlier_items = b"[]"  # as JSON
        self._answer_name = ""  # of the kept answer
        self._places: Places | None = None  # while this surface's own names are looked at
        self._tools = ResponseTools()
        self._names: Names = {}  # in the conversation, with earlier turns
        self._numbers = itertools.count()
        self.num_looked_up = 0
        self.events = event_format(self._numbers)
        self.begun: Fields = {}  # a background response before anything of it was told
        self.first_events = b""  # of one that streams: they come at once, and with no piece
        self.is_too_long = False  # the answer, to be kept

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        self._raw = raw if self._keeps else {**raw, "store": False}
        if _is_background(raw):
            self._check_background()
            after = self._num_told if self._num_told > len(BEGINNING) else 0
            name = response_name(f"{RESPONSE_PREFIX}{self._request_id}", self._tenant)
            self.key = own_key(name, PATH, raw, after)
        previous = raw.get("previous_response_id")
        earlier = Earlier((), {}, b"[]") if previous is None else self._kept.find(previous, self._tenant)
        self._tools = response_tools(raw.get("tools"))
        told = {**raw, "input": self._with_items(raw.get("input"), earlier.items)}
        self._earlier_items, self._input = earlier.items, told["input"]
        self._names = {**earlier.names, **names_of_calls(told["input"]), **self._tools.names}
        body, self._places = chat_body(told, ignored, earlier.messages, self._tools)
        messages = [each.message for each in self._places.messages]
        self._messages = messages[1:] if raw.get("instructions") else messages
        return body

    def num_to_look_up(self, raw: Mapping[str, object]) -> int:
        given = raw.get("input")
        refers = isinstance(given, list) and any(map(_is_reference, given[:MAX_MESSAGES]))  # more are refused
        self.num_looked_up = self._kept.num_bytes(raw.get("previous_response_id"), self._tenant)
        return self.num_looked_up + (MAX_BYTES_OF_ONE if refers else 0)

    def _check_background(self) -> None:
        text = ""
        if not self._goes_on:
            text = "background: this router has no folder for it (--answers-dir, without --no-store-responses)"
        elif self._raw.get("store") is False:
            text = "background: a response that is not kept (store) could not be asked for"
        if text:
            raise RequestError(text, param="background", code="unsupported_value")

    @property
    def is_background(self) -> bool:
        """Nobody waits for the answer to a body that was read."""
        return self.key is not None

    @property
    def asked(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(self._raw)

    @property
    def left_out(self) -> Sequence[str]:
        return self._tools.left_out

    def own_names(self, text: str) -> str:
        return renamed(self._tools.own_names(text), FIELD_NAMES, self._places)

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form:
        kept = context.answer.kept
        self._answer_name = "" if kept is None else kept.key.name
        form = ResponseForm(context, turns, self._raw, self._tools, self._numbers, self._on_end)
        if self.is_background:
            self.begun = form.begun()  # the form is not kept here: it leads back
            if body.stream:
                self.first_events = encode_typed(form.begin())
                self.events = event_format(self._numbers, len(BEGINNING))
        return form

    def what_is_asked(self, response_id: str) -> Asked:
        """Return what is kept of an answer that was begun before there is any of it."""
        earlier = self._earlier_items
        items = listed(self._input, response_id, ids_of(earlier) if has_own_ids(self._input) else frozenset())
        return Asked(joined_arrays(earlier, msgspec.json.encode(items)), self._answer_name)

    def _with_items(self, given: object, earlier: bytes) -> object:
        """Return the input with items in place of references to them. Raises RequestError that names the place."""
        check_num_items(given)
        if not isinstance(given, list) or not any(map(_is_reference, given)):
            return given
        items, num_bytes = list(given), 0
        names = [each.get("id") for each in given if _is_reference(each)]
        found = self._kept.find_items(names, self._tenant, earlier)
        for index, each in enumerate(given):
            if not _is_reference(each):
                continue
            where, name = f"input[{index}]", each.get("id")
            item = found.get(name) if isinstance(name, str) else None
            if item is None:
                text = f"{where}: the item {shown(name)} is not kept here (any more); send the item itself"
                raise RequestError(text, param=where, code="item_not_found")
            num_bytes += len(item)
            if num_bytes > MAX_BYTES_OF_ONE:  # one long item may be named thousands of times
                raise RequestError(f"{where}: items of more than {MAX_BYTES_OF_ONE} bytes are referred to", param=where)
            items[index] = msgspec.json.decode(item)
        self.num_looked_up += num_bytes
        return items

    def _on_end(self, response_id: str, answer: Message, response: Fields) -> Callable[[], None]:
        """Return what keeps a response. May be called from any thread."""
        if self._raw.get("store") is False:
            return lambda: None
        items, encoded = response["output"], msgspec.json.encode(response)
        assert isinstance(items, list)
        messages = [*self._messages, answer]
        asked = self.what_is_asked(response_id)
        keep = self._kept.keeper(response_id, self._tenant, messages, items, encoded, self._names, asked)
        self.is_too_long = keep is too_long
        return keep


def _is_reference(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == "item_reference"


def _is_background(raw: Mapping[str, object]) -> bool:
    asked = raw.get("background")
    if asked is not None and not isinstance(asked, bool):
        raise RequestError(f"background must be true or false, got {shown(asked)}", param="background")
    return bool(asked)
