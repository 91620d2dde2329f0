"""/v1/chat/completions: an answer in the form of chat messages."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from ..turns.call_reader import joined_calls
from ..turns.parts import CallPiece, TurnDelta
from .chat_turns import ChatTurns
from .choice import TextPiece
from .form import Form, FormContext
from .logprobs import chat_logprobs
from .openai_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    Struct,
    ToolCall,
    ToolCallDelta,
)


class ChatForm(Form):
    """`echoed` is the text of the final message that the answer continues, where the client wants it repeated.

    `is_forced`: the answer is calls, and has no text.
    """

    def __init__(self, context: FormContext, turns: ChatTurns, *, echoed: str, is_forced: bool) -> None:
        self._context = context
        self._turns = turns
        self._options = context.options
        self._echoed = echoed
        self._is_forced = is_forced

    @property
    def has_plain_chunks(self) -> bool:
        return self._options.has_plain_chunks and self._turns.is_plain

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Struct]:
        chunks: list[Struct] = []
        if is_first:
            chunks.append(self._opening(index))
        turn = self._turns.read(index, piece)
        if turn or piece.finish is not None or piece.tokens:
            chunks.append(self._context.chunk(ChatChunk, self._choice(index, piece, turn)))
        return chunks

    def usage_chunk(self) -> Struct:
        return self._context.body(ChatChunk, [], self._context.usage())

    def whole(self, pieces: Sequence[TextPiece]) -> Struct:
        choices = [
            ChatChoice(
                index=index,
                message=self._message(index, self._turns.read(index, piece)),
                logprobs=self._logprobs(piece),
                finish_reason=self._turns.finish(index, piece),
                stop_reason=piece.stop_reason,
                token_ids=self._context.token_ids(piece),
            )
            for index, piece in enumerate(pieces)
        ]
        whole = self._context.body(ChatCompletion, choices, self._context.usage())
        whole.prompt_logprobs = self._context.prompt_logprobs(0)
        whole.prompt_token_ids = self._context.prompt_ids(0)
        return whole

    def _message(self, index: int, turn: TurnDelta) -> ChatMessage:
        content = self._echoed + turn.content
        calls = [
            ToolCall(
                id=self._turns.call_id(index, number),
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(joined_calls(turn.calls))
        ]
        reasoning = turn.reasoning or UNSET
        return ChatMessage(
            content=content if content or not calls else None,
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=calls or UNSET,
        )

    def _opening(self, index: int) -> ChatChunk:
        """Return the chunk that says who speaks, before what is said."""
        delta = ChatDelta(role="assistant", content=None if self._is_forced and not self._echoed else self._echoed)
        chunk = self._context.chunk(ChatChunk, ChatChunkChoice(index=index, delta=delta))
        chunk.prompt_token_ids = self._context.prompt_ids(0)
        return chunk

    def _choice(self, index: int, piece: TextPiece, turn: TurnDelta) -> ChatChunkChoice:
        reasoning = turn.reasoning or UNSET
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(
                content=turn.content or UNSET,
                reasoning_content=reasoning,
                reasoning=reasoning,
                tool_calls=[self._call(index, call) for call in turn.calls] or UNSET,
            ),
            logprobs=self._logprobs(piece),
            finish_reason=self._turns.finish(index, piece),
            stop_reason=piece.stop_reason if piece.finish is not None else UNSET,
            token_ids=self._context.token_ids(piece),
        )

    def _call(self, index: int, piece: CallPiece) -> ToolCallDelta:
        if piece.name is None:
            return ToolCallDelta(index=piece.index, function=FunctionCall(arguments=piece.arguments))
        return ToolCallDelta(
            index=piece.index,
            id=self._turns.call_id(index, piece.index),
            type="function",
            function=FunctionCall(name=piece.name, arguments=piece.arguments),
        )

    def _logprobs(self, piece: TextPiece) -> ChatLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        context, num_top = self._context, self._options.num_logprobs
        return chat_logprobs(piece.tokens, context.tokenizer, context.token_name, num_top)
