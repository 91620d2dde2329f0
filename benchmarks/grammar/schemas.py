"""JSON schemas to ask with: those of the JSON Schema Test Suite, and generated ones as applications write them.

The suite is in the source distribution of `jsonschema`, which is downloaded once and checked by its hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from kvferry.common.errors import ConfigError

Schema = dict[str, object]

SDIST = "jsonschema-4.26.0.tar.gz"
INDEX = "https://pypi.org/simple/jsonschema/"
DRAFT = "draft2020-12"
_WORDS = "name title age price city status kind count ratio items notes active since owner colour size".split()


@dataclass(slots=True, frozen=True)
class Case:
    source: str  # "suite" or "generated"
    name: str
    schema: Schema


def suite(folder: Path) -> list[Case]:
    """Return every schema of the suite's draft that is an object, without the optional ones."""
    with tarfile.open(fileobj=io.BytesIO(_sdist(folder)), mode="r:gz") as archive:
        cases = []
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            found = re.fullmatch(rf"[^/]+/json/tests/{DRAFT}/([^/]+)\.json", member.name)
            file = archive.extractfile(member) if found is not None else None
            if found is None or file is None:
                continue
            for group in json.loads(file.read()):
                if isinstance(group["schema"], dict):
                    cases.append(Case("suite", f"{found[1]}: {group['description']}", group["schema"]))
    return cases


def _sdist(folder: Path) -> bytes:
    """Return the distribution, from `folder` if it is there. Raises ConfigError if it cannot be had."""
    kept = folder / SDIST
    if kept.is_file():
        return kept.read_bytes()
    try:
        with urllib.request.urlopen(INDEX, timeout=60) as page:
            listing = page.read().decode()
        link = re.search(rf'href="([^"#]*{re.escape(SDIST)})#sha256=([0-9a-f]{{64}})', listing)
        if link is None:
            raise ConfigError(f"{INDEX} does not list {SDIST}")
        with urllib.request.urlopen(urljoin(INDEX, link[1]), timeout=60) as file:
            data: bytes = file.read()
    except OSError as error:
        raise ConfigError(f"the JSON Schema Test Suite cannot be downloaded: {error}") from error
    if hashlib.sha256(data).hexdigest() != link[2]:
        raise ConfigError(f"{SDIST} is not what the index says it is")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return data


# --- generated ------------------------------------------------------------------------------------------------


def generated(count: int, seed: int) -> Iterator[Case]:
    """Yield schemas of objects: bounded strings, numbers, enums, lists and objects in objects."""
    source = random.Random(seed)
    for number in range(count):
        yield Case("generated", str(number), _object(source, depth=source.randint(1, 3)))


def _object(source: random.Random, depth: int) -> Schema:
    names = source.sample(_WORDS, source.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(source, depth - 1) for name in names},
        "required": names if source.random() < 0.7 else source.sample(names, source.randint(0, len(names))),
        "additionalProperties": False,
    }


def _value(source: random.Random, depth: int) -> Schema:
    if depth > 0 and source.random() < 0.25:
        return source.choice((_object, _array))(source, depth)
    return source.choice(_LEAVES)(source)


def _string(source: random.Random) -> Schema:
    least = source.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 12)}


def _pattern(source: random.Random) -> Schema:
    return {
        "type": "string",
        "pattern": source.choice(("^[A-Z]{2,3}-[0-9]{1,4}$", "^[a-z]+@[a-z]+\\.(com|org)$", "^#[0-9a-f]{6}$")),
    }


def _format(source: random.Random) -> Schema:
    return {"type": "string", "format": source.choice(("date", "time", "date-time", "ipv4", "uuid"))}


def _integer(source: random.Random) -> Schema:
    low = source.randint(-100, 100)
    return {"type": "integer", "minimum": low, "maximum": low + source.randint(0, 1000)}


def _number(source: random.Random) -> Schema:
    return {"type": "number", "minimum": 0, "exclusiveMaximum": source.choice((1, 100))}


def _enum(source: random.Random) -> Schema:
    return {"enum": source.sample([*_WORDS, 1, 2.5, None, True], source.randint(1, 6))}


def _maybe(source: random.Random) -> Schema:
    return {"anyOf": [_string(source), {"type": "null"}]}


def _array(source: random.Random, depth: int) -> Schema:
    least = source.randint(0, 2)
    return {"type": "array", "items": _value(source, depth - 1), "minItems": least, "maxItems": least + 3}


_LEAVES: tuple[Callable[[random.Random], Schema], ...] = (
    *(_string, _pattern, _format, _integer, _number, _enum, _maybe),
)
