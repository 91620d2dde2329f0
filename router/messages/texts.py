"""Blocks of /v1/messages that are text: documents and results of searches, which the model is told line by line."""

from __future__ import annotations

from collections.abc import Mapping

from ...common.errors import RequestError
from ..bodies.fields import checked_string
from ..state.errors import clip, shown

Block = dict[str, object]


def read_block(raw: object, where: str) -> tuple[str, Block]:
    """Return a block and its type. Raises RequestError."""
    if not isinstance(raw, dict) or not isinstance(kind := raw.get("type"), str):
        raise RequestError(f"{where} must be an object with a type", param=where)
    if kind == "text" and not isinstance(raw.get("text"), str):
        raise RequestError(f"{where}.text must be a string", param=f"{where}.text")
    return kind, raw


def text_of(kind: str, block: Block, where: str, left_out: list[str]) -> str:
    """Return what a block says, `left_out` gets the places of what is asked of it and not done.

    Raises RequestError for one that is no text.
    """
    match kind:
        case "text":
            return str(block["text"])
        case "document":
            texts = [_line(block, "title", where), _line(block, "context", where), _source(block.get("source"), where)]
        case "search_result":
            content = joined_text(block.get("content"), f"{where}.content")
            texts = [_line(block, "title", where), _line(block, "source", where), content]
        case _:
            raise no_block(kind, where)
    match block.get("citations"):
        case {"enabled": True}:  # an answer has none
            left_out.append(f"{where}.citations")
    return "\n".join(filter(None, texts))


def joined_text(raw: object, where: str) -> str:
    """Return a string, or text blocks as one."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise RequestError(f"{where} must be a string or an array of text blocks", param=where)
    texts = []
    for at, each in enumerate(raw):
        kind, block = read_block(each, f"{where}[{at}]")
        if kind != "text":
            raise no_block(kind, f"{where}[{at}]")
        texts.append(str(block["text"]))
    return "\n".join(texts)


def result_text(raw: object, where: str, left_out: list[str]) -> str:
    """Return what a tool's result says: a string, or blocks as one. A reference to a tool is its name."""
    if not isinstance(raw, list):
        return joined_text(raw, where)
    texts = []
    for at, each in enumerate(raw):
        place = f"{where}[{at}]"
        kind, block = read_block(each, place)
        if kind == "tool_reference":
            texts.append(checked_string(block.get("tool_name"), f"{place}.tool_name"))
        else:
            texts.append(text_of(kind, block, place, left_out))
    return "\n".join(texts)


def no_block(kind: str, where: str) -> RequestError:
    return RequestError(
        f"{where}: blocks of type {clip(kind)} are not supported here", param=where, code="unsupported_content"
    )


def _source(raw: object, where: str) -> str:
    place = f"{where}.source"
    kind = raw.get("type") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(kind, str):
        raise RequestError(f"{place} must be an object with a type, got {shown(raw)}", param=place)
    if kind == "text":
        return checked_string(raw.get("data"), f"{place}.data")
    if kind == "content":
        return joined_text(raw.get("content"), f"{place}.content")
    text = f"{where}: documents whose source is of type {clip(kind)} are not supported here, only text and content"
    raise RequestError(text, param=place, code="unsupported_content")


def _line(raw: Mapping[str, object], name: str, where: str) -> str:
    return "" if raw.get(name) is None else checked_string(raw[name], f"{where}.{name}")
