"""The inputs of an embedding call become prompts: each is checked by itself, and named by its index if it is wrong."""

from __future__ import annotations

from ...common.errors import RequestError
from ...models.tokenizer import check_text_size
from ..api.answer import PromptText
from ..bodies.text_bodies import EmbeddingBody
from ..catalogue.version import Version


def read_inputs(version: Version, body: EmbeddingBody) -> list[PromptText]:
    """Return the prompts of a call. Raises RequestError (400)."""
    given = body.input
    if isinstance(given, str):
        return _texts(version, [given], ["input"], body)
    if all(isinstance(one, str) for one in given):
        return _texts(version, [str(one) for one in given], _names(len(given)), body)
    if all(isinstance(one, int) for one in given):
        return [_ids(version, [one for one in given if isinstance(one, int)], "input", body)]
    lists = [one for one in given if isinstance(one, list)]
    return [_ids(version, ids, name, body) for ids, name in zip(lists, _names(len(lists)), strict=True)]


def _names(count: int) -> list[str]:
    return [f"input[{index}]" for index in range(count)]


def _texts(version: Version, texts: list[str], names: list[str], body: EmbeddingBody) -> list[PromptText]:
    max_tokens = version.model.max_embedded_tokens
    cut = body.cut(max_tokens, side="right")
    add_special_tokens = body.add_special_tokens is not False
    if version.model.embedded_texts.are_lower_case:
        texts = [text.lower() for text in texts]
    if cut is None:
        _check_sizes(texts, names, max_tokens)
        encoded = version.tokenizer.encode_all(texts, add_special_tokens)
    else:
        encoded = cut.encode_all(version.tokenizer, texts, add_special_tokens)
    for ids, name in zip(encoded, names, strict=True):
        _check_length(ids, name, max_tokens)
        version.check_ids(ids, name, of_text=True)
    return list(map(PromptText, encoded, texts))


def _check_sizes(texts: list[str], names: list[str], max_tokens: int) -> None:
    for text, name in zip(texts, names, strict=True):
        try:
            check_text_size(text, max_tokens)
        except RequestError as error:
            raise RequestError(f"{name}: {error}", param=name, code="context_length_exceeded") from None


def _ids(version: Version, ids: list[int], name: str, body: EmbeddingBody) -> PromptText:
    max_tokens = version.model.max_embedded_tokens
    cut = body.cut(max_tokens, side="right")
    ids = ids if cut is None else cut.ids(ids)
    _check_length(ids, name, max_tokens)
    version.check_ids(ids, name)
    return PromptText(ids)


def _check_length(ids: list[int], name: str, max_tokens: int) -> None:
    if not ids:
        raise RequestError(f"{name} is empty: it has no tokens", param=name)
    if len(ids) > max_tokens:
        text = (
            f"{name} has {len(ids)} tokens, more than the context of {max_tokens}. "
            f"This model's maximum context length is {max_tokens} tokens"  # words by which clients know it
        )
        raise RequestError(text, param=name, code="context_length_exceeded")
