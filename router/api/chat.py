"""/v1/chat/completions: an answer in the form of chat messages."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from .choice import TextPiece
from .form import FormContext
from .logprobs import chat_logprobs, prompt_logprobs
from .openai_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    PromptLogprobs,
    Struct,
)


class ChatForm:
    """`echoed` is the text of the final message that the answer continues, where the client wants it repeated."""

    def __init__(self, context: FormContext, *, echoed: str = "") -> None:
        self._context = context
        self._options = context.options
        self._echoed = echoed

    @property
    def has_plain_chunks(self) -> bool:
        return self._options.has_plain_chunks

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Struct]:
        chunks: list[Struct] = []
        if is_first:
            chunks.append(self._opening(index))
        if piece.text or piece.finish is not None:
            chunks.append(self._context.chunk(ChatChunk, self._choice(index, piece)))
        return chunks

    def usage_chunk(self) -> Struct:
        return self._context.body(ChatChunk, [], self._context.usage())

    def whole(self, pieces: Sequence[TextPiece]) -> Struct:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=self._echoed + piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish,
                stop_reason=piece.stop_reason,
                token_ids=self._token_ids(piece),
            )
            for index, piece in enumerate(pieces)
        ]
        whole = self._context.body(ChatCompletion, choices, self._context.usage())
        whole.prompt_logprobs = self._prompt_logprobs()
        whole.prompt_token_ids = self._prompt_ids()
        return whole

    def _opening(self, index: int) -> ChatChunk:
        """Return the chunk that says who speaks, before what is said."""
        delta = ChatDelta(role="assistant", content=self._echoed)
        chunk = self._context.chunk(ChatChunk, ChatChunkChoice(index=index, delta=delta))
        chunk.prompt_token_ids = self._prompt_ids()
        return chunk

    def _choice(self, index: int, piece: TextPiece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=piece.text) if piece.text else ChatDelta(),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish,
            stop_reason=piece.stop_reason if piece.finish is not None else UNSET,
            token_ids=self._token_ids(piece),
        )

    def _logprobs(self, piece: TextPiece) -> ChatLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        context, num_top = self._context, self._options.num_logprobs
        return chat_logprobs(piece.tokens, context.tokenizer, context.token_name, num_top)

    def _token_ids(self, piece: TextPiece) -> list[int] | UnsetType:
        return [token.token_id for token in piece.tokens] if self._options.return_token_ids else UNSET

    def _prompt_ids(self) -> list[int] | UnsetType:
        return self._context.answer.prompts[0].token_ids if self._options.return_token_ids else UNSET

    def _prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        if self._options.num_prompt_logprobs is None:
            return UNSET
        scored = self._context.answer.streams[0].prompt_logprobs
        return prompt_logprobs(scored, self._context.tokenizer, self._options.num_prompt_logprobs)
