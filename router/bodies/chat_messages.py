"""Chat messages: what a message may hold, as plain dicts for the chat template.

Text and calls of tools only. Content is a string or a list of text parts, each on lines of its own but in an answer;
every other kind of part is refused by name.
What an assistant message of an earlier answer carries as null (as the openai client dumps it) is taken for absent; a
refusal that another server gave is what the assistant said.
"""

from __future__ import annotations

from ...common.errors import RequestError
from ..state.errors import clip, shown
from ..turns.earlier_calls import parse_calls
from .fields import checked_object, not_supported, take_only, unknown_field

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
CACHE_HINT = "cache_control"

_FIELDS = frozenset({"role", "content", "name", "tool_call_id"})
_FIELDS_OF_ANSWERS = frozenset({"tool_calls", "reasoning_content", "reasoning", "refusal"})  # of the assistant's
_KINDS = ("text",)  # of parts: each holds its text in the field of its name
_THOUGHTS = "thinking"  # as other servers, and clients for several of them, keep what an answer has thought
_KINDS_OF_ANSWERS = ("text", "refusal", _THOUGHTS)
# Fields that exist elsewhere: refused unless null or empty.
_UNSUPPORTED = frozenset({"function_call", "audio", "annotations"})


# Book-keeping that libraries leave in the messages that they keep, and hints to a cache that is always on.
_IGNORED = frozenset({"provider_specific_fields", "id", CACHE_HINT})


def parse_messages(raw: list[object], ignored: list[str] | None = None) -> list[dict[str, object]]:
    """Return the messages as chat templates know them. Unknown fields are refused, unless a list takes their names."""
    if not raw:
        raise RequestError("messages must not be empty", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise RequestError(f"at most {MAX_MESSAGES} messages, got {len(raw)}", param="messages")
    return [_message(item, f"messages[{index}]", ignored) for index, item in enumerate(raw)]


def check_template_switches(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    if continue_final_message and add_generation_prompt:
        text = "continue_final_message and add_generation_prompt exclude each other"
        raise RequestError(text, param="continue_final_message")


def without_cache_hints(tools: object) -> object:
    """Return a body's tools without the hints that some clients leave in them, or in their functions."""
    if not isinstance(tools, list):
        return tools
    return [_unhinted(each, "function") for each in tools]


def _unhinted(raw: object, *inner: str) -> object:
    if not isinstance(raw, dict):
        return raw
    kept = {name: value for name, value in raw.items() if name != CACHE_HINT}
    return kept | {name: _unhinted(kept[name]) for name in inner if name in kept}


def _message(item: object, where: str, ignored: list[str] | None) -> dict[str, object]:
    message: dict[str, object] = {}
    for name, value in checked_object(item, where).items():
        if value is None:
            continue
        if name in _FIELDS:
            message[name] = value
        elif name in _FIELDS_OF_ANSWERS:
            if value:
                message[name] = value
        elif name in _UNSUPPORTED:
            if value:
                raise not_supported(f"{where}.{name}")
        elif name not in _IGNORED and ignored is not None:
            ignored.append(f"{where}.{name}")
        elif name not in _IGNORED:
            raise unknown_field(name, _FIELDS | _FIELDS_OF_ANSWERS | _UNSUPPORTED, where)
    _check_role(message, where)
    if message["role"] == "developer":
        message["role"] = "system"  # OpenAI's newer name for it; templates know the older one
    content = message.get("content")
    message["content"] = _content(content, str(message["role"]), f"{where}.content", ignored)
    if message["role"] == "assistant" and isinstance(content, list) and (thoughts := _thoughts(content)):
        message.setdefault("reasoning_content", thoughts)
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > 256):
            raise RequestError(f"{where}.{name} must be a string of at most 256 characters", param=f"{where}.{name}")
    if _FIELDS_OF_ANSWERS & message.keys():
        _take_answer(message, where, ignored)
    return message


def _take_answer(message: dict[str, object], where: str, ignored: list[str] | None) -> None:
    """Check what only an answer of the model has."""
    if message["role"] != "assistant":
        name = min(_FIELDS_OF_ANSWERS & message.keys())
        raise RequestError(f"{where}.{name} is for assistant messages only", param=f"{where}.{name}")
    if "tool_calls" in message:
        message["tool_calls"] = parse_calls(message["tool_calls"], f"{where}.tool_calls", ignored)
    for name in ("reasoning_content", "reasoning", "refusal"):
        if not isinstance(message.get(name, ""), str):
            raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
    if "reasoning" in message:  # templates know the older name
        message.setdefault("reasoning_content", message.pop("reasoning"))
        message.pop("reasoning", None)
    if refusal := message.pop("refusal", None):
        message["content"] = f"{message['content']}{refusal}"


def _check_role(message: dict[str, object], where: str) -> None:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        seen = "is missing" if role is None else f"is {shown(role)}"
        raise RequestError(f"{where}.role {seen}; it must be one of {', '.join(ROLES)}", param=f"{where}.role")


def _content(content: object, role: str, where: str, ignored: list[str] | None) -> str:
    match content:
        case str():
            return content
        case None if role == "assistant":
            return ""
        case list():
            kinds = _KINDS_OF_ANSWERS if role == "assistant" else _KINDS
            # As vLLM tells them to templates that take strings; what was said in an answer is one text.
            between = "" if role == "assistant" else "\n"
            parts = [_part(part, kinds, f"{where}[{index}]", ignored) for index, part in enumerate(content)]
            return between.join(text for text, raw in zip(parts, content, strict=True) if not _is_thought(raw))
    raise RequestError(f"{where} must be a string or a list of text parts", param=where)


def _thoughts(content: list[object]) -> str:
    """Return the thoughts among parts that were checked."""
    return "".join(str(part[_THOUGHTS]) for part in content if isinstance(part, dict) and _is_thought(part))


def _is_thought(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == _THOUGHTS


def _part(part: object, kinds: tuple[str, ...], where: str, ignored: list[str] | None) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RequestError(f"{where} must be an object with a type", param=where)
    kind = part["type"]
    if kind not in kinds:
        raise RequestError(
            f"{where}: content of type {clip(kind)} is not supported, only text",
            param=where,
            code="unsupported_content",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{kind} must be a string", param=f"{where}.{kind}")
    labels = (CACHE_HINT, "signature") if kind == _THOUGHTS else (CACHE_HINT,)  # who signs what it thought checks it
    take_only(part, frozenset({"type", kind, *labels}), where, ignored)
    return text
