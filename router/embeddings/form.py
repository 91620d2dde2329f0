"""Vectors in OpenAI's words: cut to the dimensions that are asked for, as numbers or as base64 of float32."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

import msgspec

from ...common.vectors import unit, values_of
from ..api.answer import Answer
from ..api.choice import TextPiece
from ..api.form import Form
from ..api.openai_types import Struct
from ..bodies.text_bodies import EmbeddingBody


class EmbeddingUsage(Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct, kw_only=True):
    object: str = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class EmbeddingForm(Form):
    """There is nothing to tell before the whole."""

    def __init__(self, answer: Answer, model: str, body: EmbeddingBody) -> None:
        self._answer = answer
        self._model = model
        self._dimensions = body.dimensions
        self._as_base64 = body.encoding_format == "base64"

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> Sequence[Struct]:
        return ()

    def whole(self, pieces: Sequence[TextPiece]) -> Struct:
        return self._list([self._item(index) for index in range(len(self._answer.requests))])

    @property
    def num_bytes(self) -> int:
        """The size of all vectors as they came."""
        return sum(len(request.embedding) for request in self._answer.requests)

    def parts(self) -> Iterator[bytes]:
        """Yield what `whole` is as JSON, a vector at a time: no call of the encoder has more to do."""
        before, after = msgspec.json.encode(self._list([])).split(b"[]", 1)
        yield before + b"["
        for index in range(len(self._answer.requests)):
            yield b"," * (index > 0) + msgspec.json.encode(self._item(index))
        yield b"]" + after

    def _list(self, items: list[EmbeddingItem]) -> EmbeddingList:
        return EmbeddingList(data=items, model=self._model, usage=self._usage())

    def _item(self, index: int) -> EmbeddingItem:
        return EmbeddingItem(index=index, embedding=self._shown(self._answer.requests[index].embedding))

    def _usage(self) -> EmbeddingUsage:
        num_tokens = sum(len(prompt.token_ids) for prompt in self._answer.prompts)
        return EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)

    def _shown(self, vector: bytes) -> list[float] | str:
        vector = shortened(vector, self._dimensions)
        return base64.b64encode(vector).decode("ascii") if self._as_base64 else values_of(vector).tolist()


def shortened(vector: bytes, dimensions: int | None) -> bytes:
    """Return the first values of a vector, scaled to length 1 again: what Matryoshka models are trained for."""
    if dimensions is None or 4 * dimensions >= len(vector):
        return vector
    cut = vector[: 4 * dimensions]
    return unit(cut) or cut
