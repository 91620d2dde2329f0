"""Numbers of a schema, as far as the library has them: it reads each as a float, and writes what it has read.

values   Where another number than the one in `const` or `enum` would come, the schema is refused: there are no other
         words for a single number.
bounds   From 2^53 on, and where it reads another float, the nearest bound on the inner side that it has stands in the
         place of the given one. What is farther out than 2^63 - 1 stays behind that.
"""

from __future__ import annotations

import math
from decimal import Decimal

from ..common.errors import RequestError
from .limits import refusal, unkept_refusal

_EXACT = 2**53  # up to here each whole number is a float
_LAST = 2**63 - 1  # the library makes whole numbers of 64 bits, and calls itself for ever at -2^63
_NEEDS_END = 10**18  # from here on it makes no interval without an end: it looks for one of as many digits
# Sign by which a number is farther in, keywords of the closed and of the open bound.
_SIDES = ((1, "minimum", "exclusiveMinimum"), (-1, "maximum", "exclusiveMaximum"))


def check_values(value: object, path: str) -> None:
    """Check that each number of a value would come as it is. Raises RequestError with its path."""
    if isinstance(value, list):
        for index, part in enumerate(value):
            check_values(part, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, part in value.items():
            check_values(part, f"{path}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and not _comes_as_it_is(value):
        reason = "whole numbers are exact up to 2^53, others up to 15 digits and 2^63; as a string it would be kept"
        raise refusal(f"has the number {_shown(value)} at '{path[1:]}', which cannot be kept: {reason}", path)


def holds_none(schema: dict[str, object]) -> bool:
    """Tell whether no number within these bounds would come as it is."""
    try:
        keep_bounds(dict(schema), "")
    except RequestError:
        return True
    return False


def keep_bounds(schema: dict[str, object], path: str) -> None:
    """Put bounds that the library has in the place of those that it has not. Raises RequestError where none is left."""
    is_whole, was_empty = _is_whole(schema), _is_empty(schema)
    changed = [keyword for side in _SIDES for keyword in _keep_side(schema, side, is_whole, path)]
    if not changed:
        return
    _end_far_intervals(schema, is_whole)
    if _is_empty(schema) and not was_empty:
        raise unkept_refusal(changed[0], f"{path}.{changed[0]}", "no number within the bounds would come as it is")


def _keep_side(schema: dict[str, object], side: tuple[int, str, str], is_whole: bool, path: str) -> list[str]:
    """Put one closed bound in the place of large ones, and return the keywords whose numbers may be others now."""
    sign, closed, opened = side
    found, changed = dict[str, int](), list[str]()
    for keyword in (closed, opened):
        bound = number_of(schema, keyword)
        if bound is None:
            continue
        if abs(bound) < _EXACT:
            schema[keyword] = within = _read_within(bound, sign)
            changed += [keyword] if within != bound else []
            continue
        is_open = keyword == opened or schema.get(opened) is True  # as draft 4 has it
        nearest = _nearest(bound, sign, is_open=is_open, is_whole=is_whole)
        if nearest is None:
            raise unkept_refusal(keyword, f"{path}.{keyword}", "numbers there end with 2^63 - 1")
        found[keyword] = nearest
    if found:
        for keyword in (*found, opened) if schema.get(opened) is True else found:
            schema.pop(keyword, None)
        bounds = [*found.values(), *([given] if (given := number_of(schema, closed)) is not None else [])]
        schema[closed] = sign * max(sign * bound for bound in bounds)
    return [*changed, *found]


def _end_far_intervals(schema: dict[str, object], is_whole: bool) -> None:
    for sign, closed, _ in _SIDES:
        _, other_closed, other_open = _SIDES[sign == 1]
        bound = number_of(schema, closed)
        if bound is None or sign * bound < _NEEDS_END or {other_closed, other_open} & schema.keys():
            continue
        schema[other_closed] = _nearest(sign * _LAST, -sign, is_open=False, is_whole=is_whole)


def _nearest(bound: int | float, sign: int, *, is_open: bool, is_whole: bool) -> int | None:
    """Return the nearest closed bound on the inner side, from 2^53 on, that comes as it is; None: there is none.

    Whole numbers are compared with what the library reads, others with how it writes that: in as few digits as can be.
    """
    if sign * bound > _LAST:
        return None
    limit, is_open = (-sign * _LAST, False) if sign * bound < -_LAST else (int(bound), is_open)
    read = float(limit)
    while abs(read) <= 2.0**63:
        nearest = _as_whole(read)
        compared = (nearest,) if is_whole else (nearest, _as_written(read))
        if nearest >= -_LAST and all(sign * (each - limit) >= is_open for each in compared):
            return nearest
        read = math.nextafter(read, sign * math.inf)
    return None


def _read_within(bound: int | float, sign: int) -> int | float:
    """Return the nearest number, not farther out than the bound, that the library reads as it is: it does so twice."""
    nearest = bound
    while isinstance(nearest, float) and _as_read(nearest) != nearest:
        nearest = math.nextafter(nearest, sign * math.inf)
    return nearest


def _comes_as_it_is(value: int | float) -> bool:
    if not abs(value) <= _LAST:  # NaN too
        return False
    if isinstance(value, int):
        return _as_whole(float(value)) == value
    if abs(value) < _EXACT:
        return _as_read(value) == value
    # It is whole, and comes with all its digits where `type` says so, with as few as can be elsewhere.
    return _as_read(value) == value and int(value) == _as_written(value)


def _as_whole(read: float) -> int:
    return min(int(read), _LAST)


def _as_written(read: float) -> int:
    return int(Decimal(repr(read)))


def _as_read(value: float) -> float:
    """Return what the library reads of a float's text (serde_json): its digits as a float, times a power of ten."""
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int), "the value is finite"
    read = float(int("".join(map(str, digits))))
    while exponent < -308:
        read, exponent = read / 1e308, exponent + 308
    read = read * float(f"1e{exponent}") if exponent >= 0 else read / float(f"1e{-exponent}")
    return -read if sign else read


def _is_empty(schema: dict[str, object]) -> bool:
    """Tell whether a lower bound is above an upper one."""
    lower, upper = (
        [bound for keyword in keywords if (bound := number_of(schema, keyword)) is not None] for _, *keywords in _SIDES
    )
    return bool(lower and upper) and max(lower) > min(upper)


def _is_whole(schema: dict[str, object]) -> bool:
    """Tell whether no number but whole ones may come."""
    types = schema.get("type")
    names = types if isinstance(types, list) else [types]
    return "integer" in names and "number" not in names


def number_of(schema: dict[str, object], keyword: str) -> int | float | None:
    value = schema.get(keyword)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:  # NaN: the library refuses it
        return None
    return value


def _shown(value: int | float) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
