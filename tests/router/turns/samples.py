"""Texts as models write them, sound and broken, made from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvferry.router.turns.call_reader import CallReader, joined_calls
from kvferry.router.turns.deepseek import HUNYUAN, DeepSeekSyntax
from kvferry.router.turns.gemma import GemmaSyntax
from kvferry.router.turns.json_syntaxes import (
    COMMAND_TAGS,
    GRANITE_TAGS,
    LLAMA_TAGS,
    NEMOTRON_TAGS,
    BareJsonSyntax,
    EitherSyntax,
    HermesSyntax,
    MistralSyntax,
)
from kvferry.router.turns.paired import GLM, MINIMAX, PairedSyntax
from kvferry.router.turns.pythonic import PythonicSyntax
from kvferry.router.turns.qwen_coder import SEED, QwenCoderSyntax
from kvferry.router.turns.syntax import Call, Schemas, Syntax

NAMES = ("search", "get_weather", "write.file", "a-b")
SCHEMAS: Schemas = {
    "search": {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}},
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}},
    "write.file": {"type": "object", "properties": {"text": {"type": "string"}, "parts": {"type": "array"}}},
    "a-b": {"type": "object"},
}
WORDS = (
    "Let me look", " ", "\n", "\n\n", "ü→😀", '{"a": 1}', "[1, 2]", "<tool", "<tool_call>", "</tool_call>",
    "<function=",
    "[TOOL_CALLS]", "[TOOL", "{", "}", '"', "\\", ";", "<|python_tag|>", "<think>", "</think>", "name", "</function>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "```", "functools", "<|tool_call|>", "<TOOLCALL>", "</TOOLCALL>", "<TOOL",
    "<tool_calls>", "</tool_calls>", "search\n```json\n", "<|START_ACTION|>", "<|END_ACTION|>", "<|START",
    "<seed:tool_call>", "</seed:tool_call>", "<seed",
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="search">', "</invoke>", "</parameter>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<function_calls>", "</function_calls>", "search(", ")", "=", "'", "[search(query=",
    "<|tool_call>", "<tool_call|>", '<|"|>', "call:search{", "limit:", "<|tool", "<tool_call|",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    "x", "", "a \"quoted\" \\ back", "{not} [json", "</tool_call>", "line\nbreak", "ü😀", 0, -1.5, True, None, [1, [2]],
    {"deep": {"er": []}}, "<parameter=x>", "[TOOL_CALLS]",
)  # fmt: skip


def read_calls(text: str, syntax: Syntax) -> tuple[str, Sequence[Call]]:
    """Return a whole text's content and calls."""
    delta = CallReader(syntax).push(text, is_final=True)
    return delta.content, joined_calls(delta.calls)


@dataclass(frozen=True)
class Form:
    syntax: Syntax
    write: Callable[[random.Random, str, dict[str, object]], str]


def _hermes(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:
        call = json.dumps({"arguments": arguments, "name": name})
    call = rng.choice([call, call, f"{call}\n{call}", f"[{call}, {call}]", f"```json\n{call}\n```"])
    blank = rng.choice(["", "\n", " "])
    return f"<tool_call>{blank}{call}{blank}</tool_call>"


def _nemotron(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    calls = json.dumps([{"name": name, "arguments": arguments}] * rng.randint(1, 3))
    blank = rng.choice(["", "\n"])
    return f"<TOOLCALL>{blank}{calls}{blank}{rng.choice(['</TOOLCALL>', '</TOOLCALL>', ''])}"


def _mistral(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    if rng.random() < 0.5:
        return f"[TOOL_CALLS]{name}{rng.choice(['', '[ARGS]', '[CALL_ID]abc[ARGS]'])}{json.dumps(arguments)}"
    calls = [{"name": name, "arguments": arguments, "id": "abcdefghi"}] * rng.randint(1, 2)
    return f"[TOOL_CALLS] {json.dumps(calls)}"


def _bare(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    call = json.dumps({"name": name, "parameters": arguments}, indent=rng.choice([None, 2]))
    return rng.choice([call, f"{call}; {call}", f"[{call}, {call}]"])


def _llama(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    return rng.choice(["", "<|python_tag|>"]) + _bare(rng, name, arguments)


def _granite(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    begin, end = rng.choice(list(GRANITE_TAGS.items()))
    return f"{begin}{_bare(rng, name, arguments)}{rng.choice(['', end])}"


def _coder(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    call = f"<function={name}>\n{parameters}</function>"
    if rng.random() < 0.2:
        call = call.replace("</parameter>\n", "")
    return call if rng.random() < 0.3 else f"<tool_call>\n{call}\n</tool_call>"


def _seed(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    return _coder(rng, name, arguments).replace("tool_call>", "seed:tool_call>")


def _glm(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    blank = rng.choice(["", "\n"])
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    pairs = [f"<arg_key>{key}</arg_key>{blank}<arg_value>{text}</arg_value>{blank}" for key, text in texts.items()]
    return f"<tool_call>{name}{blank}{''.join(pairs)}</tool_call>"


def _minimax(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    blank = rng.choice(["", "\n"])
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = [f'<parameter name="{key}">{text}</parameter>{blank}' for key, text in texts.items()]
    calls = [f'<invoke name="{name}">{blank}{"".join(parameters)}</invoke>{blank}'] * rng.randint(1, 2)
    inner = "".join(calls)
    return inner.rstrip() if rng.random() < 0.2 else f"<minimax:tool_call>{blank}{inner}</minimax:tool_call>"


def _deepseek(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    written = json.dumps(arguments, ensure_ascii=rng.random() < 0.5)
    is_old, num_calls = rng.random() < 0.5, rng.randint(1, 2)
    parts = f"function<｜tool▁sep｜>{name}\n```json\n{written}\n```" if is_old else f"{name}<｜tool▁sep｜>{written}"
    calls = rng.choice(["", "\n"]).join([f"<｜tool▁call▁begin｜>{parts}<｜tool▁call▁end｜>"] * num_calls)
    return calls if rng.random() < 0.2 else f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"


def _hunyuan(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    written, num_calls, blank = json.dumps(arguments), rng.randint(1, 2), rng.choice(["", "\n"])
    if rng.random() < 0.5:
        calls = json.dumps([{"name": name, "arguments": arguments}] * num_calls)
        return f"<tool_calls>{blank}{calls}{blank}</tool_calls>"
    calls = blank.join([f"<tool_call>{name}\n```json\n{written}\n```{blank}</tool_call>"] * num_calls)
    return calls if rng.random() < 0.2 else f"<tool_calls>{blank}{calls}{blank}</tool_calls>"


def _command(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    call = {"tool_call_id": "0", "tool_name": name, "parameters": arguments}
    if rng.random() < 0.3:
        del call["tool_call_id"]
    written = json.dumps([call] * rng.randint(1, 2), indent=rng.choice([None, 4]))
    return f"<|START_ACTION|>{written}{rng.choice(['', '<|END_ACTION|>'])}"


def _pythonic(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    parts = rng.choice([", ", ","]).join(f"{key}={_python(rng, value)}" for key, value in arguments.items())
    calls = [f"{name}({parts})"] * rng.randint(1, 2)
    if rng.random() < 0.5:
        return "<function_calls>\n" + "\n".join(calls) + "\n</function_calls>"
    if rng.random() < 0.3:
        return f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>"
    return rng.choice(["", "<|python_start|>"]) + f"[{', '.join(calls)}]" + rng.choice(["", "<|python_end|>"])


def _gemma(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    call = f"<|tool_call>call:{name}{_gemma_value(arguments)}<tool_call|>"
    return rng.choice(["", "\n"]).join([call] * rng.randint(1, 2))


def _gemma_value(value: object) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{_gemma_value(child)}" for key, child in sorted(value.items())) + "}"
        case list():
            return "[" + ",".join(map(_gemma_value, value)) + "]"
    return json.dumps(value)


def _told_otherwise(rng: random.Random, name: str, arguments: dict[str, object]) -> str:
    return rng.choice([_coder, _hermes])(rng, name, arguments)


def _python(rng: random.Random, value: object) -> str:
    return repr(value) if rng.random() < 0.5 else json.dumps(value, ensure_ascii=rng.random() < 0.5)


FORMS: dict[str, Form] = {
    "hermes": Form(HermesSyntax(), _hermes),
    "nemotron_json": Form(HermesSyntax(NEMOTRON_TAGS), _nemotron),
    "mistral": Form(MistralSyntax(), _mistral),
    "llama3_json": Form(BareJsonSyntax(NAMES, LLAMA_TAGS), _llama),
    "granite": Form(BareJsonSyntax(NAMES, GRANITE_TAGS), _granite),
    "json": Form(BareJsonSyntax(NAMES), _bare),
    "deepseek_v3": Form(DeepSeekSyntax(), _deepseek),
    "hunyuan_a13b": Form(DeepSeekSyntax(HUNYUAN), _hunyuan),
    "cohere_command3": Form(BareJsonSyntax(NAMES, COMMAND_TAGS), _command),
    "pythonic": Form(PythonicSyntax(SCHEMAS), _pythonic),
    "qwen3_coder": Form(QwenCoderSyntax(SCHEMAS), _coder),
    "seed_oss": Form(QwenCoderSyntax(SCHEMAS, SEED), _seed),
    "glm": Form(PairedSyntax(GLM, SCHEMAS), _glm),
    "minimax_m2": Form(PairedSyntax(MINIMAX, SCHEMAS), _minimax),
    "gemma4": Form(GemmaSyntax(SCHEMAS), _gemma),
    "told otherwise": Form(EitherSyntax(QwenCoderSyntax(SCHEMAS)), _told_otherwise),
}


def arguments_of(rng: random.Random) -> dict[str, object]:
    keys = rng.sample(["query", "limit", "city", "days", "text", "parts"], rng.randint(0, 3))
    return {key: rng.choice(VALUES) for key in keys}


def text_of(rng: random.Random, form: Form) -> str:
    """A text of content, calls and what looks like them; cut off or with a character changed now and then."""
    parts = [
        form.write(rng, rng.choice(NAMES), arguments_of(rng)) if rng.random() < 0.5 else rng.choice(WORDS)
        for _ in range(rng.randint(1, 4))
    ]
    text = rng.choice(["", "", "\n"]).join(parts)
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text) + 1)]
    if text and rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}"<>[]x\\') + text[at + 1 :]
    return text
