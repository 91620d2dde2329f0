"""A schema loses words that the library takes and does not keep: others stand in their place.

open bounds   Between a whole number and one less than 1 farther from zero it takes the whole number itself, though it
              must not come: 0 for `{"exclusiveMinimum": 0, "maximum": 0.5}`. A bound right beside it is put there.
dates         It takes the 29th of February in every year. Dates become patterns that know leap years (RFC 3339,
              appendix C).
numbers       It reads each as a float: other bounds, or a refusal (kept_numbers.py).
names         A free one may come twice, and counts twice then: `minProperties` is refused where that would do.
"""

from __future__ import annotations

import math
import re

from .kept_numbers import check_values, keep_bounds, number_of
from .limits import DATA, NAMED, unkept_refusal

# A grammar without this has nothing of them. No number with fewer digits, and without an exponent, is read as another.
MAY_BE = re.compile(rb'"exclusiveM|"minProp|"date|\d[\d.]{15}|\d[eE][-+]?\d')
_STEP = 1e-9  # what is nearer to the bound does not come. Smaller: more digits to match
_LEAP_YEAR = r"(?:\d\d(?:[2468][048]|[13579][26]|0[48])|(?:[02468][048]|[13579][26])00)"
_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)"
_DATE = rf"(?:\d{{4}}-(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?(?:[zZ]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_DATES = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}


def in_kept_words(schema: object, path: str = "") -> object:
    """Return the schema with other words for those that the library does not keep.

    Raises RequestError, with a path that begins with this one, for what has no other words.
    """
    if isinstance(schema, list):
        return [in_kept_words(part, f"{path}[{index}]") for index, part in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: _value(keyword, value, f"{path}.{keyword}") for keyword, value in schema.items()}
    keep_bounds(kept, path)
    _check_names(kept, path)
    _close(kept, 1, "exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"))
    _close(kept, -1, "exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"))
    if (pattern := _DATES.get(str(kept.get("format")))) is not None:
        del kept["format"]
        given = kept.get("allOf", [])
        if "pattern" not in kept:
            kept["pattern"] = pattern
        elif isinstance(given, list):
            kept["allOf"] = [*given, {"pattern": pattern}]
    return kept


def _value(keyword: str, value: object, path: str) -> object:
    if keyword in ("const", "enum"):
        check_values(value, path)
    if keyword in DATA or keyword == "not":  # its other words are made of the given ones (negation.py)
        return value
    if keyword in NAMED and isinstance(value, dict):
        return {name: in_kept_words(part, f"{path}.{name}") for name, part in value.items()}
    return in_kept_words(value, path)


def _check_names(schema: dict[str, object], path: str) -> None:
    """Refuse `minProperties` that a name may meet which comes twice: one that is free is none of the required ones."""
    least, required = number_of(schema, "minProperties"), schema.get("required", [])
    are_all_told = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if least is None or are_all_told or not isinstance(required, list):
        return
    if least > 1 + len({name for name in required if isinstance(name, str)}):
        raise unkept_refusal("minProperties", f"{path}.minProperties", "a name might come twice")


def _close(schema: dict[str, object], sign: int, is_open: str, is_closed: str, opposite: tuple[str, str]) -> None:
    """Put a closed bound in the place of an open one. `sign`: of numbers, so that the bound is the lower one."""
    limits = [sign * limit for name in opposite if (limit := number_of(schema, name)) is not None]
    bound = number_of(schema, is_open)
    if bound is None or bound % 1 or sign * bound < 0 or not limits:  # else it is the one farther from zero
        return
    if not 0 < (room := min(limits) - sign * bound) < 1:
        return
    del schema[is_open]
    given = number_of(schema, is_closed)
    nearest = max(sign * bound + min(_STEP, room / 2), math.nextafter(sign * bound, math.inf))
    schema[is_closed] = sign * (nearest if given is None else max(nearest, sign * given))
