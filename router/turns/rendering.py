"""A chat is rendered as it stands or, where its template does not take it so, told in another way.

several calls at once      ─> one in each message (`told.py`)
arguments                  ─> JSON, where the template adds them to a text
our own system message     ─> the user's first
Of system messages after the first, which agents send, templates refuse some, or drop them without a word:
several at the beginning   ─> one, with a blank line between
a later one                ─> the turn of the user beside it; one of its own where there is none
                              or, where a template wants roles to take turns, the end of the result before it
Templates as Mistral's and Gemma's want these two to take turns, which agents do not keep to:
messages of one role       ─> one, with a blank line between
a user's after results     ─> as it stands, behind a word of the assistant's
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, takewhile

from ...common.errors import RequestError
from .told import told_in_turns, told_otherwise, with_written_arguments

Fields = Mapping[str, object]
Render = Callable[[Sequence[Fields]], Awaitable[str]]  # raises RequestError for what the template does not take


async def rendered(render: Render, messages: Sequence[Fields], has_own_system: bool) -> str:
    """Return the prompt. Raises RequestError where no way is taken.

    `has_own_system`: the client has sent the first system message.
    """
    try:
        return await _rendered(render, messages, has_own_system)
    except RequestError as error:
        others = [message for message in messages if not _is_system(message)]
        if not _is_refusal(error) or told_in_turns(others) is None:
            raise
        with suppress(RequestError):
            return await _rendered(lambda told: render(told_in_turns(told) or told), messages, has_own_system)
        raise


async def _rendered(render: Render, messages: Sequence[Fields], has_own_system: bool) -> str:
    """Render the messages; where the template refuses or drops later system messages, told in another way."""
    if not any(_is_system(message) for message in messages[1:]):
        return await _rendered_calls(render, messages, has_own_system)
    with _unless_refused():
        prompt = await _rendered_calls(render, messages, has_own_system)
        if _tells_systems(prompt, messages):
            return prompt
    *others, last = _without_later_systems(messages)
    for other in others:
        with _unless_refused():
            return await _rendered_calls(render, other, has_own_system)
    return await _rendered_calls(render, last, has_own_system)


async def _rendered_calls(render: Render, messages: Sequence[Fields], has_own_system: bool) -> str:
    """Render the messages; where the template refuses them, with calls or tools told in another way."""
    try:
        return await render(messages)
    except RequestError as error:
        if not _is_refusal(error):
            raise
        with _unless_refused():
            if (written := with_written_arguments(messages)) is not None:
                return await render(written)
        if (otherwise := told_otherwise(messages, has_own_system=has_own_system)) is None:
            raise
    return await render(otherwise)


def _is_refusal(error: RequestError) -> bool:
    """Tell whether the template itself refuses the messages.

    What is too much for it has a code, and is no less when it is told in another way.
    """
    return error.code is None


@contextmanager
def _unless_refused() -> Iterator[None]:
    """Go on behind the block where the template itself refuses the messages."""
    try:
        yield
    except RequestError as error:
        if not _is_refusal(error):
            raise


def _tells_systems(prompt: str, messages: Sequence[Fields]) -> bool:
    """Tell whether a prompt says what each system message says, and not only what users quote of it.

    Texts stand in the order of the messages, or the system's before all others, as in DeepSeek V3.1's prompts.
    """
    said = [message for message in messages if _is_system(message) or message["role"] == "user"]
    return _says(prompt, said) or _says(prompt, sorted(said, key=lambda message: not _is_system(message)))


def _without_later_systems(messages: Sequence[Fields]) -> list[list[Fields]]:
    """Return the ways to tell the messages without later system messages, the better one first."""
    best, other = (_told(messages, in_results=in_results) for in_results in (False, True))
    return [best] if other == best else [best, other]


def _says(prompt: str, messages: Sequence[Fields]) -> bool:
    at = 0
    for message in messages:
        text = str(message["content"]).strip()  # templates may trim it
        if (at := prompt.find(text, at)) < 0:
            return False
        at += len(text)
    return True


def _told(messages: Sequence[Fields], *, in_results: bool) -> list[Fields]:
    first = list(takewhile(_is_system, messages))
    told: list[Fields] = [{**first[0], "content": _joined(*first)}] if first else []
    untold: list[Fields] = []
    for is_system, group in groupby(messages[len(first) :], _is_system):
        turns = list(group)
        if is_system and told and told[-1]["role"] == "user":
            told[-1] = {**told[-1], "content": _joined(told[-1], *turns)}
            continue
        if is_system:
            untold = turns
            continue
        if untold and turns[0]["role"] == "user":
            turns[0] = {**turns[0], "content": _joined(*untold, turns[0])}
        elif untold:
            _tell_alone(untold, told, in_results=in_results)
        untold = []
        told += turns
    if untold:
        _tell_alone(untold, told, in_results=in_results)
    return told


def _tell_alone(untold: Sequence[Fields], told: list[Fields], *, in_results: bool) -> None:
    if in_results and told and told[-1]["role"] == "tool":
        told[-1] = {**told[-1], "content": _joined(told[-1], *untold)}
    else:
        told.append({"role": "user", "content": _joined(*untold)})


def _is_system(message: Fields) -> bool:
    return message["role"] == "system"


def _joined(*messages: Fields) -> str:
    return "\n\n".join(str(message["content"]) for message in messages if message["content"])
