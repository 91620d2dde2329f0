"""A full context in Anthropic's words: its clients read the numbers off them, and ask for less or shorten the chat."""

from __future__ import annotations

import re

FULL = "context_length_exceeded"

# The refusals' own words, with their numbers.
_OF_CONTEXT = re.compile(
    r"This model's maximum context length is (?P<limit>\d+) tokens; the prompt has (?P<prompt>\d+)"
    r"(?: and max_tokens asks for (?P<asked>\d+))?"
)
_OF_BYTES = re.compile(r"the prompt has at least \d+ bytes; a context of (?P<limit>\d+) tokens")
_OF_WORKERS = re.compile(
    r"(?P<prompt>\d+) prompt tokens and 1 x up to (?P<asked>\d+) new ones need \d+ KV blocks of (?P<size>\d+) tokens; "
    r"the largest \w+ worker has (?P<blocks>\d+)"
)


def full_context(message: str) -> str:
    """Return a refusal's message behind the words that tell it to Anthropic's clients, where they are known."""
    if found := _OF_CONTEXT.match(message):
        words = _words(int(found["prompt"]), int(found["asked"] or 1), int(found["limit"]))
    elif found := _OF_BYTES.match(message):
        words = f"prompt is too long: at least {found['limit']} tokens > {int(found['limit']) - 1} maximum"
    elif found := _OF_WORKERS.search(message):
        words = _words(int(found["prompt"]), int(found["asked"]), int(found["size"]) * int(found["blocks"]))
    else:
        words = ""
    return f"{words}: {message}" if words else message


def _words(prompt: int, asked: int, limit: int) -> str:
    if prompt >= limit:  # a token of the answer needs room as well
        return f"prompt is too long: {prompt} tokens > {limit - 1} maximum"
    if prompt + asked > limit:
        return f"input length and `max_tokens` exceed context limit: {prompt} + {asked} > {limit}"
    return ""
