"""The forms in which clients ask for a grammar become one `Grammar`: OpenAI's and vLLM's, of today and of before.

    response_format       text, json_object, json_schema (strict or not: it is always kept), structural_tag
    structured_outputs    one of json, json_object, regex, choice, grammar, structural_tag
    guided_*              json, regex, choice, grammar
    allowed_token_ids     tokens, of which every one of the answer is one

At most one grammar may be asked for, in several of these forms, too: some clients send it to servers of today and of
before. Whether it can be followed is for `helpers/grammar_checker.py` to say.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ...common.errors import RequestError
from ...common.grammar import COMPACT, MAX_GRAMMAR_BYTES, MAX_MASK_BYTES, Grammar, pack_mask
from ...grammar.gbnf import is_lark, unforced
from ..turns.values.closing import closed
from .fields import not_supported, take_only
from .structural_tags import object_at, tags_grammar, wrong

FIELDS = (
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    "allowed_token_ids",
)
# Of `structured_outputs`, beside the forms: how the text is laid out or what compiles it. Value -> asks for nothing.
_OPTIONS: dict[str, tuple[object, ...]] = {
    "disable_any_whitespace": (True, False),
    "disable_additional_properties": (True, False),
    "disable_fallback": (True, False),
    "whitespace_pattern": (),
    "_backend": (),  # these two are there where vLLM's own object was written down
    "_backend_was_auto": (True, False),
}


class AskedGrammar(NamedTuple):
    """A grammar, and the field of the body that asks for it."""

    grammar: Grammar
    param: str


Ignored = list[str] | None
Read = Callable[[str, object], AskedGrammar | None]  # of a form's name and value
ReadField = Callable[[str, object, Ignored], AskedGrammar | None]


def asked_grammar(fields: Mapping[str, object], ignored: list[str] | None) -> AskedGrammar | None:
    """Return what a body's `FIELDS` ask for; None: any text. Raises RequestError that names the field and the rule.

    Unknown fields of theirs are refused, unless a list takes their names.
    """
    asked = [
        found
        for name in FIELDS
        if (value := fields.get(name)) is not None and (found := _READ[name](name, value, ignored)) is not None
    ]
    if len({each.grammar for each in asked}) > 1:
        names = " and ".join(f"'{each.param}'" for each in asked)
        raise RequestError(f"an answer follows one grammar, {names} ask for several", param=asked[1].param)
    return asked[0] if asked else None


def _response_format(name: str, value: object, ignored: Ignored) -> AskedGrammar | None:
    fields = object_at(name, value)
    match fields.get("type"):
        case "text":
            _check_names(name, fields, {"type"}, ignored)
            return None
        case "json_object":
            _check_names(name, fields, {"type"}, ignored)
            return AskedGrammar(Grammar("json_object", b""), name)
        case "json_schema":
            _check_names(name, fields, {"type", "json_schema"}, ignored)
            return _named_schema(f"{name}.json_schema", fields.get("json_schema"), ignored)
        case "structural_tag":
            _check_names(name, fields, {"type", "structures", "triggers", "format"}, ignored)
            return _structural_tag(name, value)
        case other:
            raise wrong(f"{name}.type", "must be text, json_object, json_schema or structural_tag", other)


def _named_schema(name: str, value: object, ignored: Ignored) -> AskedGrammar:
    fields = object_at(name, value)
    _check_names(name, fields, {"name", "description", "schema", "strict"}, ignored)
    for text in ("name", "description"):
        if not isinstance(fields.get(text), str | None):
            raise wrong(f"{name}.{text}", "must be a string", fields[text])
    if not isinstance(fields.get("strict"), bool | None):
        raise wrong(f"{name}.strict", "must be true or false", fields["strict"])
    if fields.get("schema") is None:
        raise RequestError(f"'{name}.schema' is required", param=f"{name}.schema", code="missing_required_parameter")
    return _json(f"{name}.schema", fields["schema"])


def _structured_outputs(name: str, value: object, ignored: Ignored) -> AskedGrammar | None:
    fields = object_at(name, value)
    _check_names(name, fields, {*_FORMS, *_OPTIONS}, ignored)
    for option, harmless in _OPTIONS.items():
        if (given := fields.get(option)) is not None and given not in harmless:
            raise not_supported(f"{name}.{option}", harmless)
    asked = [form for form in _FORMS if fields.get(form) is not None]
    if len(asked) != 1:
        raise RequestError(f"'{name}' has {len(asked)} forms, it takes one of {', '.join(_FORMS)}", param=name)
    [form] = asked
    if form == "json" and fields.get("disable_additional_properties") is False:
        found: AskedGrammar | None = _json(f"{name}.json", fields["json"], is_open=True)
    else:
        found = _FORMS[form](f"{name}.{form}", fields[form])
    if found is not None and form in ("json", "json_object") and fields.get("disable_any_whitespace"):
        grammar = found.grammar
        return found._replace(grammar=Grammar(COMPACT + grammar.kind, grammar.text))
    return found


def _json(name: str, value: object, *, is_open: bool = False) -> AskedGrammar:
    """A schema, as an object or as the text of one. `is_open`: its objects may have further properties."""
    schema, asked = value, None
    if isinstance(value, str):
        asked = _asked("json_schema", value, name)  # bounded, before it is parsed
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            return asked  # who compiles it says what is wrong
    if not isinstance(schema, dict | bool):
        raise wrong(name, "must be a JSON schema", schema)
    asked = asked or _asked("json_schema", _dumps(schema), name)
    if isinstance(schema, dict) and not is_open:
        with contextlib.suppress(RequestError, RecursionError):  # of one that is longer then than may be, or very deep
            return _asked("json_schema", _dumps(closed(schema)), name)
    return asked


def _dumps(schema: object) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _json_object(name: str, value: object) -> AskedGrammar | None:
    if not isinstance(value, bool):
        raise wrong(name, "must be true or false", value)
    return AskedGrammar(Grammar("json_object", b""), name) if value else None


def _regex(name: str, value: object) -> AskedGrammar:
    return _asked("regex", _text(name, value), name)


def _grammar(name: str, value: object) -> AskedGrammar:
    text = _text(name, value)
    return _asked("lark", unforced(text) if is_lark(text) else text, name)


def _choice(name: str, value: object) -> AskedGrammar:
    if not isinstance(value, list) or not value or set(map(type, value)) != {str}:
        raise wrong(name, "must be a list of strings, and not be empty", value)
    return _asked("choice", json.dumps(value, ensure_ascii=False), name)


def _tokens(name: str, value: object) -> AskedGrammar:
    """Tokens, checked before to be numbers, and later to be the vocabulary's."""
    if not isinstance(value, list) or not value:
        raise wrong(name, "must be a list of token ids, and not be empty", value)
    if not 0 <= min(value) <= max(value) < 8 * MAX_MASK_BYTES:
        raise wrong(name, "must be a list of token ids", min(value) if min(value) < 0 else max(value))
    mask = bytearray(-(-(max(value) + 1) // 32) * 4)
    for token_id in value:
        mask[token_id >> 3] |= 1 << (token_id & 7)
    return _bounded("tokens", pack_mask(bytes(mask)), name)


def _structural_tag(name: str, value: object) -> AskedGrammar:
    if isinstance(value, str):
        _asked("lark", value, name)  # bounded, before it is parsed
    try:
        tag = json.loads(value) if isinstance(value, str) else value
        return _asked("lark", tags_grammar(name, object_at(name, tag)), name)
    except (ValueError, RecursionError):
        raise wrong(name, "must be JSON, and not nested too deep", value) from None


def _asked(kind: str, text: str, param: str) -> AskedGrammar:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"'{param}' has a lone surrogate and is not valid Unicode", param=param) from None
    return _bounded(kind, data, param)


def _bounded(kind: str, data: bytes, param: str) -> AskedGrammar:
    if len(data) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"'{param}' has {len(data)} bytes; the limit is {MAX_GRAMMAR_BYTES}",
            param=param,
            code="unsupported_grammar",
        )
    return AskedGrammar(Grammar(kind, data), param)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise wrong(name, "must be a string, and not be empty", value)
    return value


def _check_names(name: str, fields: Mapping[str, object], known: set[str], ignored: Ignored) -> None:
    take_only(fields, frozenset(known), name, ignored)


def _plain(read: Read) -> ReadField:
    """Return a way to read a field that is a form itself: it has no fields of its own."""
    return lambda name, value, ignored: read(name, value)


_FORMS: dict[str, Read] = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
_READ: dict[str, ReadField] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _plain(_json),
    "guided_regex": _plain(_regex),
    "guided_choice": _plain(_choice),
    "guided_grammar": _plain(_grammar),
    "allowed_token_ids": _plain(_tokens),
}
