"""Structural tags as a grammar: an answer of parts, each of which has a form of its own.

{"format": {"type": "tag", "begin": "<f>", "content": {"type": "any_text"}, "end": "</f>"}}
{"triggers": ["<f="], "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}]}

The second form is the older one: text in which a trigger begins a tag. The kinds of formats, and what they mean, are
XGrammar's. The library that follows grammars reads words, each of which takes as much as it can, and would take what
must follow. So free text, and what a regular expression says, is ended by the first end of its tag, or by a trigger,
and stands nowhere without: there it would go on for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...common.errors import RequestError
from ..state.errors import shown
from ..turns.lazy import json_rule
from ..turns.values.closing import closed
from .fields import not_supported, unknown_field

MAX_FORMATS = 512  # in a structural tag, those of tags among them
MAX_DEPTH = 16  # of formats within formats
# A number may go on with zeros for ever: where its tag's end begins with one, it must. Such a run is not looked for.
_HEAD = ('%llguidance {"no_forcing": true}', r"TEXT: /(.|\n)*/")
_SPECIAL = re.compile(r"\\(?:(.)|\Z)|[/%\r\n]", re.DOTALL)
_SPELLED = {"/": r"\/", "%": r"\x25", "\r": r"\r", "\n": r"\n"}  # of a regular expression between slashes
_Fields = Mapping[str, object]


class _End(NamedTuple):
    """An `_End` is what follows a format at once."""

    rule: str  # empty: the answer's end, or what is no part of this
    ends_text: bool  # it tells where free text is over


_OF_ANSWER = _End("", ends_text=True)
_MORE = _End("", ends_text=False)


def tags_grammar(name: str, fields: _Fields) -> str:
    """Return the grammar in Lark's form. Raises RequestError about a field below `name`."""
    tags = _Tags()
    if fields.get("format") is None:
        whole = tags.older(name, fields)
    elif fields.get("structures") is not None or fields.get("triggers") is not None:
        raise RequestError(f"'{name}' has a format beside structures and triggers: it takes either form", param=name)
    else:
        whole = tags.format(f"{name}.format", fields["format"], _OF_ANSWER, 1)
    return "\n".join([*_HEAD, *tags.rules, f"start: {whole}", ""])


class _Tags:
    """The rules of a grammar, as its formats are read. A format becomes the body of a rule, with what follows it."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self._num_formats = 0

    def _rule(self, body: str) -> str:
        self.rules.append(f"r{len(self.rules)}: {body}")
        return f"r{len(self.rules) - 1}"

    def _until(self, text: str, end: str) -> str:
        """Return a text up to the first place where it may end, and with its end."""
        if not end:
            return text
        self.rules.append(f"r{len(self.rules)}[lazy]: {text} {end}")
        return f"r{len(self.rules) - 1}"

    # --- formats -------------------------------------------------------------------------------------------

    def format(self, name: str, value: object, end: _End, depth: int) -> str:
        """Return a format with what follows it."""
        fields = object_at(name, value)
        kind = fields.get("type")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise wrong(f"{name}.type", f"must be one of {', '.join(_KINDS)}", kind)
        self._check(name, kind, fields, depth)
        return _KINDS[kind].read(self, name, fields, end, depth)

    def _check(self, name: str, kind: str, fields: Mapping[str, object], depth: int) -> None:
        self._num_formats += 1
        if depth > MAX_DEPTH or self._num_formats > MAX_FORMATS:
            what = f"is nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"is one more than {MAX_FORMATS}"
            raise RequestError(f"'{name}' {what} formats, the limit", param=name[:128], code="unsupported_grammar")
        known = _KINDS[kind].fields
        for field, given in fields.items():
            if field not in known and field != "type" and given is not None:
                raise unknown_field(field, frozenset(known), name)
            if given is not None and (harmless := known.get(field)) is not None and given not in harmless:
                raise not_supported(f"{name}.{field}", harmless)

    def const(self, name: str, fields: _Fields, end: _End, _depth: int) -> str:
        return f"{_literal(f'{name}.value', fields.get('value'))} {end.rule}"

    def schema(self, name: str, fields: _Fields, end: _End, _depth: int) -> str:
        schema = fields.get("json_schema")
        if not isinstance(schema, dict) and schema is not True:
            raise wrong(f"{name}.json_schema", "must be an object, or true", schema)
        rule = json_rule(closed(schema) if isinstance(schema, dict) else {})
        return f"{rule} {end.rule}"

    def regex(self, name: str, fields: _Fields, end: _End, _depth: int) -> str:
        pattern = _string(f"{name}.pattern", fields.get("pattern"))

        def spelled(found: re.Match[str]) -> str:
            if found[0] == "\\":
                raise wrong(f"{name}.pattern", "must not end within an escape", pattern)
            return _SPELLED.get(found[0][-1], found[0])

        _check_ends(name, "a regex", end)
        return self._until(f"/{_SPECIAL.sub(spelled, pattern)}/" if pattern else '""', end.rule)

    def any_text(self, name: str, _fields: _Fields, end: _End, _depth: int) -> str:
        _check_ends(name, "any_text", end)
        return self._until("TEXT", end.rule)

    def sequence(self, name: str, fields: _Fields, end: _End, depth: int) -> str:
        elements = _list(f"{name}.elements", fields.get("elements"))
        ends = [_MORE] * (len(elements) - 1) + [end]
        places = [f"{name}.elements[{index}]" for index in range(len(elements))]
        return " ".join(self.format(*each, depth + 1) for each in zip(places, elements, ends, strict=True))

    def either(self, name: str, fields: _Fields, end: _End, depth: int) -> str:
        elements = enumerate(_list(f"{name}.elements", fields.get("elements")))
        return _either([self.format(f"{name}.elements[{i}]", each, end, depth + 1) for i, each in elements])

    def tag(self, name: str, fields: _Fields, end: _End, depth: int) -> str:
        begin = _literal(f"{name}.begin", fields.get("begin"))
        return f"{begin} {self._behind_begin(name, fields, depth)} {end.rule}"

    def _behind_begin(self, name: str, fields: _Fields, depth: int) -> str:
        """Return a tag's content and its end."""
        given = fields.get("end")
        ends = [_string(f"{name}.end", each) for each in (given if isinstance(given, list) and given else [given])]
        self.rules.append(f"END_{len(self.rules)}: {_either([_literal(f'{name}.end', each) for each in ends])}")
        end = _End(f"END_{len(self.rules) - 1}", ends_text=all(ends))
        return self.format(f"{name}.content", fields.get("content"), end, depth + 1)

    def _tags(self, name: str, value: object, depth: int) -> Iterator[tuple[str, dict[str, object]]]:
        """Yield the tags of a list, with their places. They need not say that they are tags."""
        for index, tag in enumerate(_list(name, value)):
            place, fields = f"{name}[{index}]", object_at(f"{name}[{index}]", tag)
            if (kind := fields.get("type", "tag")) != "tag":
                raise wrong(f"{place}.type", "must be tag", kind)
            self._check(place, "tag", fields, depth)
            yield place, fields

    def separated(self, name: str, fields: _Fields, end: _End, depth: int) -> str:
        tags = self._tags(f"{name}.tags", fields.get("tags"), depth + 1)
        one = self._rule(_either([self.tag(place, tag, _MORE, depth + 1) for place, tag in tags]))
        whole, separator = one, _literal(f"{name}.separator", fields.get("separator"))
        if not _flag(name, fields, "stop_after_first"):
            whole = f"{one} ({separator} {one})*"
        if not _flag(name, fields, "at_least_one"):
            whole = f"({whole})?"
        return f"{whole} {end.rule}"

    def triggered(self, name: str, fields: _Fields, end: _End, depth: int) -> str:
        tags = self._tags(f"{name}.tags", fields.get("tags"), depth + 1)
        return self._in_text(name, fields, tags, end, depth)

    def older(self, name: str, fields: _Fields) -> str:
        """Return the older form: text with tags in it, each of which has a schema."""
        tags = list[tuple[str, dict[str, object]]]()
        for index, given in enumerate(_list(f"{name}.structures", fields.get("structures"))):
            place, tag = f"{name}.structures[{index}]", object_at(f"{name}.structures[{index}]", given)
            schema = {} if tag.get("schema") is None else tag["schema"]
            if not isinstance(schema, dict):
                raise wrong(f"{place}.schema", "must be an object", schema)
            tags.append((place, {**tag, "content": {"type": "json_schema", "json_schema": schema}}))
        return self._in_text(name, {"triggers": fields.get("triggers")}, tags, _OF_ANSWER, 1)

    def _in_text(self, name: str, fields: _Fields, tags: Iterable[tuple[str, _Fields]], end: _End, depth: int) -> str:
        triggers = [_string(f"{name}.triggers", each) for each in _list(f"{name}.triggers", fields.get("triggers"))]
        heads: dict[str, str] = {}
        at_once, in_text = list[str](), list[str]()
        for place, tag in tags:
            begin = _string(f"{place}.begin", tag.get("begin"))
            found = [each for each in triggers if each and begin.startswith(each)]
            if len(found) != 1:
                text = f"'{place}.begin' begins with {'several' if found else 'none'} of the triggers"
                raise RequestError(text, param=f"{place}.begin")
            [trigger] = found
            behind = self._behind_begin(place, tag, depth + 1)
            rest = self._rule(f"{_literal(place, begin.removeprefix(trigger))} {behind}")
            if trigger not in heads:
                heads[trigger] = self._until("TEXT", _literal(name, trigger))
            at_once.append(f"{_literal(name, trigger)} {rest}")
            in_text.append(f"{heads[trigger]} {rest}")
        if unused := [each for each in triggers if each not in heads]:
            raise wrong(f"{name}.triggers", "must each begin one of the tags", unused[0])
        must, is_one = _flag(name, fields, "at_least_one"), _flag(name, fields, "stop_after_first")
        if must and is_one:
            return f"{_either(at_once)} {end.rule}"
        _check_ends(name, "triggered_tags", end)
        text = self._until("TEXT", end.rule)
        if is_one:
            return _either([f"{_either(in_text)} {end.rule}", text])
        return f"{_either(at_once) if must else ''} {_either(in_text)}* {text}"


class _Kind(NamedTuple):
    """A kind of formats."""

    read: Callable[[_Tags, str, _Fields, _End, int], str]
    fields: Mapping[str, tuple[object, ...] | None]  # with the values that ask for nothing; None: any is taken


_HOW_MANY = {"at_least_one": None, "stop_after_first": None}
_KINDS: dict[str, _Kind] = {
    "const_string": _Kind(_Tags.const, {"value": None}),
    "json_schema": _Kind(
        _Tags.schema,
        {"json_schema": None, "style": ("json",), "any_order": (False,), "max_whitespace_cnt": (), "excludes": ([],)},
    ),
    "regex": _Kind(_Tags.regex, {"pattern": None}),
    "any_text": _Kind(_Tags.any_text, {"excludes": ([],), "max_tokens": (), "max_chars": ()}),
    "sequence": _Kind(_Tags.sequence, {"elements": None}),
    "or": _Kind(_Tags.either, {"elements": None}),
    "tag": _Kind(_Tags.tag, {"begin": None, "content": None, "end": None}),
    "triggered_tags": _Kind(_Tags.triggered, {"triggers": None, "tags": None, **_HOW_MANY, "excludes": ([],)}),
    "tags_with_separator": _Kind(_Tags.separated, {"tags": None, "separator": None, **_HOW_MANY}),
}


def _either(bodies: Sequence[str]) -> str:
    return f"({' | '.join(bodies)})"


def _literal(name: str, value: object) -> str:
    """Return a text between quotes, in which nothing looks like a schema within a grammar."""
    text = json.dumps(_string(name, value), ensure_ascii=False)
    return text.replace("%", "\\u0025").replace("\x7f", "\\u007f")


def _check_ends(name: str, kind: str, end: _End) -> None:
    if not end.ends_text:
        text = f"'{name}' is {kind}, which nothing ends: it must come last, in the answer or in a tag with an end"
        raise RequestError(text, param=name[:128], code="unsupported_grammar")


def object_at(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise wrong(name, "must be an object", value)
    return value


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise wrong(name, "must be a list, and not be empty", value)
    return value


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong(name, "must be a string", value)
    return value


def _flag(name: str, fields: _Fields, field: str) -> bool:
    value = fields.get(field)
    if not isinstance(value, bool | None):
        raise wrong(f"{name}.{field}", "must be true or false", value)
    return bool(value)


def wrong(name: str, rule: str, value: object) -> RequestError:
    got = "nothing" if value is None else shown(value)
    return RequestError(f"'{name}' {rule}, got {got}", param=name[:128], code="invalid_value")
