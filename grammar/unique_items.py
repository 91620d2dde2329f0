"""`uniqueItems` is said as the orders of a few items of which each may come once."""

from __future__ import annotations

import itertools

from .negation import NOTES, any_of, other_types
from .references import CannotRewrite, References, Schema

_MAX_REFERENCES = 16  # that lead to one another
# All orders of four members: 50 ms to compile, of five 400 ms (AVX2, two cores). Each order is a branch.
_MAX_ORDERS = 24

_Scalar = str | int | float | None


def of_unique(schema: dict[str, object], references: References) -> Schema:
    """Return a schema for the lists without an item that comes twice, beside `items`. Raises CannotRewrite.

    A list of at most one item is one. Else its items have to be a few known values.
    """
    most = schema.get("maxItems")
    if schema["uniqueItems"] is not True or "prefixItems" in schema:
        raise CannotRewrite
    if isinstance(most, int | float) and most <= 1:
        return True
    members = _members(schema.get("items"), references)
    length = min(len(members), int(most)) if isinstance(most, int | float) else len(members)
    orders = list(itertools.islice(itertools.permutations(members, length), _MAX_ORDERS + 1))
    if len(orders) > _MAX_ORDERS:
        raise CannotRewrite
    return any_of([other_types("array"), *(_beginnings_of(order, references) for order in orders)])


def _members(items: object, references: References) -> list[_Scalar]:
    """Return the different values that an item may be."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(items, dict):
            break
        demands = {keyword: value for keyword, value in items.items() if keyword not in NOTES}
        if "const" in demands or isinstance(demands.get("enum"), list):
            values = [demands["const"]] if "const" in demands else demands["enum"]
            assert isinstance(values, list)
            return _different(values)
        if demands == {"type": "boolean"}:
            return [False, True]
        if list(demands) != ["$ref"]:
            break
        items = references.target(str(demands["$ref"]))
    raise CannotRewrite


def _different(values: list[object]) -> list[_Scalar]:
    """Return each value once, as JSON compares them: 1 is 1.0 and not true."""
    found: dict[tuple[bool, _Scalar], _Scalar] = {}
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise CannotRewrite
        found.setdefault((isinstance(value, bool), value), value)
    return list(found.values())


def _beginnings_of(order: tuple[_Scalar, ...], references: References) -> Schema:
    """Return a schema for the first items of this order, however many."""
    return {"type": "array", **references.listed([{"const": value} for value in order], False)}
