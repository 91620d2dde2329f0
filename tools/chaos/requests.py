"""The requests of a chaos run: every way in which an answer can be asked for, drawn from a seed.

Each has a seed of its own, so that its answer is one and the same whenever and wherever it is computed. What may differ
between two sendings without touching the answer (priority, cache salt) is added when it is sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .events import ChoiceAnswer

Body = dict[str, object]

_PROMPT_LENS = (1, 5, 16, 17, 60, 150, 400)
_MIN_ANSWER, _MAX_ANSWER = 4, 160
_MAX_TURN = 150  # of a conversation, which has two of them and an answer between
_FIRST_ID = 4  # below are special tokens
_RESPONSES, _MESSAGES = "/v1/responses", "/v1/messages"
FOLLOWING = "response again"
_SENTENCES = r"([A-Z][a-z]{0,9}( [a-z]{1,9}){1,9}\. ?){1,40}"
_RECORDS: Body = {
    "type": "array",
    "items": {"type": "object", "properties": {"id": {"type": "integer"}, "on": {"type": "boolean"}}},
}
_TOOLS: list[Body] = [
    {
        "name": name,
        "parameters": {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        },
    }
    for name, fields in (
        ("find", {"text": {"type": "string", "maxLength": 40}, "limit": {"type": "integer"}}),
        ("move", {"where": {"enum": ["left", "right", "nowhere"]}, "now": {"type": "boolean"}}),
    )
]
_ONE_TOOL: Body = {"type": "function", "function": {"name": "move"}}
_WORDS = "the a worker block stream token dies goes on 42 again never once in order elsewhere Zwerg".split()


@dataclass(slots=True, frozen=True)
class Ask:
    """One distinct request."""

    number: int
    kind: str
    path: str
    body: Body
    num_choices: int
    max_tokens: int
    is_stream: bool
    follows: int | None = None  # another request, whose answer this one goes on with
    wants_stop: bool = False  # a stop string is taken from its own answer once that is known

    @property
    def tells_tokens(self) -> bool:
        """The answer says its tokens, and not the text alone."""
        return self.path not in (_RESPONSES, _MESSAGES)

    @property
    def is_background(self) -> bool:
        """The client does not wait for the answer."""
        return bool(self.body.get("background"))

    def with_stop(self, answer: ChoiceAnswer) -> Ask:
        """The same with a stop string of three characters from the middle of the answer, wherever tokens begin."""
        middle = max(0, len(answer.text) // 2 - 1)
        stop = answer.text[middle : middle + 3]
        return replace(self, body={**self.body, "stop": [stop, "no such text"]} if stop else self.body)

    def send_body(self, source: random.Random) -> Body:
        """Return the body with what does not touch the answer: half of the prompts are in no prefix cache."""
        extra: Body = {"priority": source.choice((-1, 0, 0, 0, 1))}
        if source.random() < 0.5:
            extra["cache_salt"] = f"{source.getrandbits(64):x}"
        return self.body | extra


def plan_asks(count: int, seed: int, *, models: Sequence[str], vocab_size: int, kinds: Sequence[str] = ()) -> list[Ask]:
    """`count` distinct requests, these kinds in turn, each round of them for the next model; no kind named: all."""
    source = random.Random(seed)
    makers = [(kind, ASK_KINDS[kind]) for kind in kinds or ASK_KINDS]
    asks: list[Ask] = []
    for number in range(count):
        turn, place = divmod(number, len(makers))
        ask = _make(number, *makers[place], source, models[turn % len(models)], vocab_size)
        if ask.kind == FOLLOWING:
            first = next((earlier.number for earlier in reversed(asks) if earlier.path == ask.path), None)
            ask = replace(ask, follows=first)
        asks.append(ask)
    return asks


def _make(
    number: int,
    kind: str,
    more: Callable[[random.Random], Body],
    source: random.Random,
    model: str,
    vocab_size: int,
) -> Ask:
    words = kind.split()
    is_stream = "stream" in words or not {"whole", "background"} & set(words)
    length = source.choice(_PROMPT_LENS)
    max_tokens = source.randint(_MIN_ANSWER, _MAX_ANSWER)
    body: Body = {"model": model, "stream": is_stream}
    if words[0] == "response":
        length = min(length, _MAX_TURN)
    text = " ".join(source.choices(_WORDS, k=max(1, length // 3)))
    if words[0] == "response":
        body |= {"input": text, "max_output_tokens": max_tokens, "seed": source.getrandbits(31), **more(source)}
        return Ask(number, kind, _RESPONSES, body, 1, max_tokens, is_stream)
    messages = [{"role": "user", "content": text}]
    if words[0] == "message":
        body |= {"messages": messages, "max_tokens": max_tokens, "temperature": 0, **more(source)}
        return Ask(number, kind, _MESSAGES, body, 1, max_tokens, is_stream)
    body |= {"max_tokens": max_tokens, "seed": source.getrandbits(31), "return_token_ids": True}
    body |= {"ignore_eos": source.random() < 0.8, **more(source)}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    if words[0] == "chat":
        path = "/v1/chat/completions"
        body["messages"] = messages
    else:
        path = "/v1/completions"
        body["prompt"] = [source.randrange(_FIRST_ID, vocab_size) for _ in range(length)]
    num_choices = body.get("n", 1)
    assert isinstance(num_choices, int)
    return Ask(number, kind, path, body, num_choices, max_tokens, is_stream, wants_stop="stop" in words)


def _warm(source: random.Random) -> Body:
    return {"temperature": round(source.uniform(0.5, 1.3), 2), "top_p": source.choice((1.0, 0.95, 0.8))}


def _penalties(source: random.Random) -> Body:
    return {
        **_warm(source),
        "presence_penalty": round(source.uniform(-1, 1), 2),
        "frequency_penalty": round(source.uniform(-1, 1), 2),
        "repetition_penalty": round(source.uniform(1, 1.3), 2),
        "top_k": source.choice((0, 40)),
        "bad_words": source.sample(_WORDS, 2),
    }


def _tools(source: random.Random) -> Body:
    choice = source.choice(("required", "required", "auto", _ONE_TOOL))
    tools = [{"type": "function", "function": tool} for tool in _TOOLS]
    return {**_warm(source), "tools": tools, "tool_choice": choice, "parallel_tool_calls": source.random() < 0.5}


def _response_tools(source: random.Random) -> Body:
    tools = [{"type": "function", "strict": True, **tool} for tool in _TOOLS]
    return {**_warm(source), "tools": tools, "tool_choice": source.choice(("required", "auto"))}


def _message_tools(source: random.Random) -> Body:
    tools = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in _TOOLS]
    return {"tools": tools, "tool_choice": {"type": source.choice(("any", "any", "auto"))}}


ASK_KINDS: dict[str, Callable[[random.Random], Body]] = {
    "greedy": lambda source: {"temperature": 0},
    "seeded": _warm,
    "choices": lambda source: {**_warm(source), "n": source.choice((2, 3))},
    "stop": lambda source: {"temperature": 0},
    "stop seeded": lambda source: {**_warm(source), "include_stop_str_in_output": source.random() < 0.5},
    "logprobs": lambda source: {**_warm(source), "logprobs": 3},
    "penalties": _penalties,
    "chat": _warm,
    "chat logprobs": lambda source: {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    "chat tools": _tools,
    "guided": lambda source: {**_warm(source), "guided_regex": _SENTENCES},
    "guided choices": lambda source: {**_warm(source), "n": 2, "guided_json": _RECORDS},
    "whole": _warm,
    "whole choices": lambda source: {**_warm(source), "n": 2, "logprobs": 1},
    "response": _warm,
    "response whole": _warm,
    "response tools": _response_tools,
    FOLLOWING: _warm,
    "response background": lambda source: {**_warm(source), "background": True},
    "response background stream": lambda source: {**_warm(source), "background": True},
    "message": lambda source: {"top_k": source.choice((1, 40))},
    "message whole": lambda source: {},
    "message tools": _message_tools,
}
