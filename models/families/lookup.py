"""Architectures by what a checkpoint says of itself: by its family's name, by one that is like it, by its code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from .nested import NESTED
from .table import FAMILIES

ARCHITECTURES = (*FAMILIES, *NESTED)
_EXPERTS = [family.experts for family in FAMILIES.values() if family.experts is not None]
GATES = tuple(sorted({gate for experts in _EXPERTS for gate in experts.gates}))  # names in a layer, of all families
# A published checkpoint may have another spelling than the class that libraries have by now: ERNIE's, K-EXAONE's.
_EARLIER_NAMES = {
    "Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
}
_ALIKE = 0.6  # of two names: difflib's own measure; below, names of strangers share as many letters


def architecture_of(model_type: object) -> str | None:
    """Return the architecture of a family by its name."""
    known = {own.name: architecture for table in (NESTED, FAMILIES) for architecture, own in table.items()}
    return known.get(model_type) if isinstance(model_type, str) else None


def declared_architecture(config: Mapping[str, object]) -> object:
    """Return the first architecture that a config.json names, by its present name; None: it names none."""
    declared = config.get("architectures")
    return _of_today(declared[0] if isinstance(declared, list) and declared else None)


def _of_today(name: object) -> object:
    """Return an architecture's present name in the place of an earlier one."""
    return _EARLIER_NAMES.get(name, name) if isinstance(name, str) else name


def nearest(name: str, known: Iterable[str]) -> str:
    """Tell the known name that is most like another, behind a list of all; nothing where none is."""
    stems = {_stem(each): each for each in reversed(tuple(known))}
    found = difflib.get_close_matches(_stem(name), stems, n=1, cutoff=_ALIKE)
    return f"; the nearest is {stems[found[0]]}" if found else ""


def _stem(architecture: str) -> str:
    return architecture.partition("For")[0].lower()


def needs_code(config: Mapping[str, object]) -> bool:
    """Tell whether a config.json asks for Python code in place of which there is none here.

    Checkpoints of known families often carry the code of the time before libraries knew them (Phi-3, DeepSeek-V2): the
    class that it names is the architecture's, which is built in. transformers takes its own class there, too.
    """
    if "auto_map" not in config:
        return False
    code, architecture = config["auto_map"], declared_architecture(config)
    named = code.get("AutoModelForCausalLM") if isinstance(code, Mapping) else None
    has_own = isinstance(named, str) and _of_today(named.rpartition(".")[2]) == architecture
    return not (has_own and architecture in ARCHITECTURES)
