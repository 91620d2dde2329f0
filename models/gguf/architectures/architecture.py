"""An architecture of GGUF files says how these differ from a Llama's: the tables beside it have one entry for each.

What a checkpoint of the same family has is known by its own table (`models/families/table.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...families.family import Family
from ...families.table import FAMILIES


@dataclass(slots=True, frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture`, as far as its files differ from a Llama's."""

    checkpoint: str  # what it is called in a checkpoint, in config.json's `architectures`
    layer: Mapping[str, str]  # a layer's tensors: names here, names in a checkpoint
    reads: tuple[str, ...] = ()  # fields beyond those that every architecture has: `config.py`
    permutes: bool = False  # rows of queries and keys: of each head's two halves in turn
    # What a checkpoint has in one tensor: the file's names in the order of its rows, and the checkpoint's name of each.
    fused: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return FAMILIES[self.checkpoint]

    @property
    def may_turn_parts(self) -> bool:
        """Tell whether positions may turn a part of each head; of lone blocks they turn nothing, of whatever length."""
        return self.family.has_partial_rope or self.family.has_wide_layers or self.family.has_lone_blocks
