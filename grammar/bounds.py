"""Open bounds of numbers are said so that the library keeps them.

Between a whole number and one less than 1 farther from zero it takes the whole number itself, though it must not come:
0 for `{"exclusiveMinimum": 0, "maximum": 0.5}`. There a bound right beside it is put in its place.
"""

from __future__ import annotations

import math

from .limits import DATA, NAMED

_STEP = 1e-9  # what is nearer to the bound does not come. Smaller: more digits to match


def with_kept_bounds(schema: object) -> object:
    """Return the schema with other bounds for those that the library does not keep."""
    if isinstance(schema, list):
        return [with_kept_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: _value(keyword, value) for keyword, value in schema.items()}
    _keep(kept, 1, "exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"))
    _keep(kept, -1, "exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"))
    return kept


def _value(keyword: str, value: object) -> object:
    if keyword in DATA:
        return value
    if keyword in NAMED and isinstance(value, dict):
        return {name: with_kept_bounds(part) for name, part in value.items()}
    return with_kept_bounds(value)


def _keep(schema: dict[str, object], sign: int, is_open: str, is_closed: str, opposite: tuple[str, str]) -> None:
    """Put a closed bound in the place of an open one. `sign`: of numbers, so that the bound is the lower one."""
    limits = [sign * limit for name in opposite if (limit := _number(schema, name)) is not None]
    bound = _number(schema, is_open)
    if bound is None or bound % 1 or sign * bound < 0 or not limits:  # else it is the one farther from zero
        return
    if not 0 < (room := min(limits) - sign * bound) < 1:
        return
    del schema[is_open]
    given = _number(schema, is_closed)
    nearest = max(sign * bound + min(_STEP, room / 2), math.nextafter(sign * bound, math.inf))
    schema[is_closed] = sign * (nearest if given is None else max(nearest, sign * given))


def _number(schema: dict[str, object], keyword: str) -> int | float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
