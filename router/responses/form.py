"""A chat's answer in the words of /v1/responses: items of output, whole or as typed events with numbers.

response.created, .in_progress ─> for each item: output_item.added, its parts and deltas, output_item.done
    ─> response.completed, or .incomplete where the length ended it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ...common.request import FinishReason
from ..api.chat_turns import ChatTurns
from ..api.choice import TextPiece
from ..api.events import EventFormat, encode_typed, encode_typed_event
from ..api.form import Form, FormContext
from ..state.errors import HttpFailure
from ..turns.blocks import Block, BlockEvent, BlockKind, Blocks
from ..turns.places import Message
from .custom import input_of
from .kept import item_id
from .logprobs import Logprobs, TokenReader
from .repeated import repeated
from .tools import ResponseTools, called

Fields = dict[str, object]

_ITEM_IDS = {"reasoning": "rs", "text": "msg", "call": "fc", "custom": "ctc"}  # how they begin
_STEMS = {
    "reasoning": "reasoning_text",
    "text": "output_text",
    "call": "function_call_arguments",
    "custom": "custom_tool_call_input",
}
_GROWING = frozenset({"arguments", "input", "content"})  # of an item: the first delta has what is there already
BEGINNING = ("created", "in_progress")  # the events before any of the answer


def event_format(numbers: Iterator[int], num_before: int = 0) -> EventFormat:
    """Return the way of writing one answer's events, with the numbers that its form takes too.

    `num_before`: events that are told elsewhere.
    """
    return EventFormat(encode_typed, lambda failure: error_event(next(numbers), failure), b"", num_before)


def error_event(number: int, failure: HttpFailure) -> bytes:
    told = {"code": failure.code, "message": failure.message, "param": failure.param}
    return encode_typed_event({"type": "error", "sequence_number": number, **told})


def failed_event(number: int, response: Fields) -> bytes:
    return encode_typed_event({"type": "response.failed", "sequence_number": number, "response": response})


class ResponseForm(Form):
    """One answer; it has one choice.

    `numbers` are its events'. `on_end` gets the assistant's message and the response when the answer has ended, on any
    thread, and returns what keeps them, on the loop.
    """

    def __init__(
        self,
        context: FormContext,
        turns: ChatTurns,
        request: Mapping[str, object],
        tools: ResponseTools,
        numbers: Iterator[int],
        on_end: Callable[[str, Message, Fields], Callable[[], None]],
    ) -> None:
        self._context = context
        self._turns = turns
        self._request = request
        self._tools = tools
        self._on_end = on_end
        self._reader = TokenReader(context, turns)
        self._blocks = Blocks()
        self._logprobs: dict[int, Logprobs] = {}  # of text, by the block's place
        self._numbers = numbers
        self._has_begun = False
        self._keep: Callable[[], None] | None = None  # the whole answer

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Fields]:
        events = self.begin() if is_first and not self._has_begun else []
        for turn, logprobs in self._reader.read(piece):
            for change in self._blocks.push(turn):
                told = self._take(change, logprobs)
                events += self._changed(change, "completed", told)
        if piece.finish is not None:
            status = _status(piece)
            for change in self._blocks.close():
                events += self._changed(change, status)
            response = self._response(status, piece)
            events.append(self._of(f"response.{status}", response=response))
            self._on_end(self._context.answer_id, self._message(), response)()
        return events

    def begun(self) -> Fields:
        """Return the response before anything of it was told."""
        return self._response("in_progress", None)

    def begin(self) -> list[Fields]:
        """Return the events before any piece, which are not told with the first one then."""
        self._has_begun, response = True, self.begun()
        return [self._of(f"response.{kind}", response=response) for kind in BEGINNING]

    def whole(self, pieces: Sequence[TextPiece]) -> Fields:
        (piece,) = pieces
        for turn, logprobs in self._reader.read(piece):
            for change in self._blocks.push(turn):
                self._take(change, logprobs)
        status = _status(piece)
        response = self._response(status, piece)
        self._keep = self._on_end(self._context.answer_id, self._message(), response)
        return response

    def keep(self) -> None:
        if self._keep is not None:
            self._keep()
            self._keep = None

    def _of(self, kind: str, **fields: object) -> Fields:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _response(self, status: str, piece: TextPiece | None) -> Fields:
        is_cut = status == "incomplete"
        return {
            "id": self._context.answer_id,
            "object": "response",
            "created_at": self._context.created,
            "status": status,
            "background": self._request.get("background") is True,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._context.model,
            "output": [] if piece is None else self._items(status),
            **repeated(self._request, self._context.answer.streams[0].request.sampling),
            "store": self._request.get("store") is not False,
            "usage": self._usage() if piece is not None else None,
        }

    def _usage(self) -> Fields:
        usage = self._context.usage()
        details = usage.completion_tokens_details
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,  # nobody pays for what is kept
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": details.reasoning_tokens if details else 0},
            "total_tokens": usage.total_tokens,
        }

    # --- items ---------------------------------------------------------------------------------------------

    def _items(self, status: str) -> list[Fields]:
        """Return the items so far; `status` is the last one's."""
        blocks = self._blocks.blocks
        last = len(blocks) - 1
        return [self._item(block, status if block.index == last else "completed") for block in blocks]

    def _item_id(self, block: Block) -> str:
        return item_id(_ITEM_IDS[self._kind(block)], self._context.answer_id, block.index)

    def _kind(self, block: Block) -> str:
        """Return a block's kind, of calls which."""
        is_custom = block.kind == "call" and self._tools.is_custom(block.name)
        return "custom" if is_custom else block.kind

    def _item(self, block: Block, status: str) -> Fields:
        item: Fields = {"id": self._item_id(block)}
        match block.kind:
            case "reasoning":
                item |= {"type": "reasoning", "summary": [], "content": [self._part(block)]}
            case "call":
                item |= {**called(self._tools.names, self._call_id(block), block.name, block.text), "status": status}
            case _:
                item |= {
                    "type": "message",
                    "role": "assistant",
                    "content": [self._part(block)],
                    "status": status,
                }
        return item

    def _call_id(self, block: Block) -> str:
        return self._turns.call_id(0, block.number)

    def _take(self, change: BlockEvent, logprobs: Logprobs) -> Logprobs:
        """Return those of the log probabilities that are the change's, and keep them."""
        if change.action != "grow" or change.block.kind != "text":
            return []
        told = list(logprobs)
        logprobs.clear()
        self._logprobs.setdefault(change.block.index, []).extend(told)
        return told

    def _part(self, block: Block) -> Fields:
        return _part(block, block.text, self._logprobs.get(block.index, []))

    def _changed(self, change: BlockEvent, status: str, logprobs: Logprobs | None = None) -> list[Fields]:
        """Return a block's events; `status` is what its end means, `logprobs` are of what it grew by."""
        block = change.block
        at: Fields = {"item_id": self._item_id(block), "output_index": block.index}
        if block.kind != "call":
            at["content_index"] = 0
        match change.action:
            case "begin":
                return self._begun(block, at)
            case "grow":
                if self._kind(block) == "custom":
                    return []  # its text is known when its arguments are whole
                shown: Fields = {"logprobs": logprobs or []} if block.kind == "text" else {}
                return [self._of(f"{self._stem(block)}.delta", **at, delta=change.text, **shown)]
        return self._ended(block, at, status)

    def _begun(self, block: Block, at: Fields) -> list[Fields]:
        item = self._item(block, "in_progress")
        item |= {name: "" if isinstance(item[name], str) else [] for name in _GROWING & item.keys()}
        added = [self._of("response.output_item.added", output_index=block.index, item=item)]
        if block.kind != "call":
            added.append(self._of("response.content_part.added", **at, part=_part(block)))
        return added

    def _ended(self, block: Block, at: Fields, status: str) -> list[Fields]:
        kind, stem = self._kind(block), self._stem(block)
        if kind == "custom":
            text = input_of(block.text)
            ended = [self._of(f"{stem}.delta", **at, delta=text)] if text else []
            ended.append(self._of(f"{stem}.done", **at, input=text))
        elif kind == "call":
            ended = [self._of(f"{stem}.done", **at, name=self._tools.own(block.name).name, arguments=block.text)]
        else:
            part = self._part(block)
            shown = {"logprobs": part["logprobs"]} if block.kind == "text" else {}
            ended = [self._of(f"{stem}.done", **at, text=block.text, **shown)]
            ended.append(self._of("response.content_part.done", **at, part=part))
        item = self._item(block, status)
        return [*ended, self._of("response.output_item.done", output_index=block.index, item=item)]

    def _stem(self, block: Block) -> str:
        return f"response.{_STEMS[self._kind(block)]}"

    def _message(self) -> Message:
        """Return the answer as a chat's message, with its thoughts: a template tells them while calls are answered."""
        blocks = self._blocks.blocks
        message: Message = {"role": "assistant", "content": self._joined("text")}
        if thoughts := self._joined("reasoning"):
            message["reasoning_content"] = thoughts
        calls = [
            {
                "id": self._call_id(block),
                "type": "function",
                "function": {"name": block.name, "arguments": block.text},
            }
            for block in blocks
            if block.kind == "call"
        ]
        return {**message, "tool_calls": calls} if calls else message

    def _joined(self, kind: BlockKind) -> str:
        return "".join(block.text for block in self._blocks.blocks if block.kind == kind)


def _status(piece: TextPiece) -> str:
    return "incomplete" if piece.finish == FinishReason.LENGTH else "completed"


def _part(block: Block, text: str = "", logprobs: Sequence[object] = ()) -> Fields:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
