"""References within a schema, followed to the schemas that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias
from urllib.parse import unquote

Schema: TypeAlias = dict[str, object] | bool

# Drafts whose `items` has one schema for each place, too, and whose `contains` evaluates no item.
_EARLIER = re.compile(r"draft-0[1-7]|2019-09")


class CannotRewrite(Exception):
    """There are no other words for a schema."""


class References:
    """The parts of one schema by their names. Only names within the schema itself are known."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._anchors: dict[str, Schema] = {}
        draft = root.get("$schema") if isinstance(root, dict) else None
        self.is_earlier_draft = isinstance(draft, str) and _EARLIER.search(draft) is not None
        self._has_resources = False  # parts with names of their own, from which references count
        has_dynamic = False
        for is_root, part in _parts(root):
            self._has_resources |= not is_root and isinstance(part.get("$id"), str)
            has_dynamic |= not str(part.get("$dynamicRef", "#/")).startswith("#/")
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(name := part.get(keyword), str):
                    self._anchors[name] = part
        self.is_dynamic = has_dynamic and self._has_resources  # a name's place depends on the way that led to it

    def listed(self, first: Sequence[Schema], rest: Schema = True) -> dict[str, object]:
        """Return the draft's keywords of lists whose first items are such, and all others as `rest` says."""
        if not first:
            return {} if rest is True else {"items": rest}
        places, others = ("items", "additionalItems") if self.is_earlier_draft else ("prefixItems", "items")
        return {places: list(first)} | ({} if rest is True else {others: rest})

    def target(self, reference: str) -> Schema:
        """Return the schema that it names. Raises CannotRewrite where there is none here."""
        if self._has_resources or not reference.startswith("#"):
            raise CannotRewrite
        fragment = unquote(reference[1:])
        if fragment and not fragment.startswith("/"):
            if fragment not in self._anchors:
                raise CannotRewrite
            return self._anchors[fragment]
        found: object = self._root
        for step in fragment.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise CannotRewrite
        if not isinstance(found, dict | bool):
            raise CannotRewrite
        return found


def may_recur(schema: object) -> bool:
    """Tell whether an instance may hold others of the same part of a schema, to any depth."""
    references = References(schema)

    def named_in(part: object) -> Iterator[Schema]:
        for _, each in _parts(part):
            for name in (each.get("$ref"), each.get("$dynamicRef")):
                if isinstance(name, str):
                    yield references.target(name)

    way: list[tuple[object, Iterator[Schema]]] = [(schema, named_in(schema))]  # from each to what it names
    on_way, seen = {id(schema)}, {id(schema)}
    try:
        while way:
            part, names = way[-1]
            if (named := next(names, None)) is None:
                way.pop()
                on_way.remove(id(part))
            elif id(named) in on_way:
                return True
            elif id(named) not in seen:
                seen.add(id(named))
                on_way.add(id(named))
                way.append((named, named_in(named)))
    except CannotRewrite:
        return True  # nobody knows where it leads
    return False


def _parts(root: object) -> Iterator[tuple[bool, dict[str, object]]]:
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value is root, value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
