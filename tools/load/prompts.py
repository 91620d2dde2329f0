"""Prompts of a wanted length, made from a seed: random token ids, or short English words where a server takes no ids.

A prompt is a list of units, one token each (a word of text is about one token; `usage` says how many it was).
Prompts of one source never repeat by chance, so a prefix cache answers only what a trace says is shared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .endpoint import Prompt
from .traces import TraceRow

_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea kid body back parent face
level office door health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy process music market sense nation plan college
""".split()


class PromptSource:
    """Prompts as token ids below `vocab_size`, or as text when that is None."""

    def __init__(self, seed: int, vocab_size: int | None) -> None:
        self._seed = seed
        self._random = random.Random(seed)
        self._units: Sequence[int] | Sequence[str] = range(vocab_size) if vocab_size is not None else _WORDS

    def make(self, num_tokens: int) -> Prompt:
        """The next prompt; the same calls on the same seed give the same prompts."""
        return self._join(self._random.choices(self._units, k=num_tokens))

    def make_for(self, row: TraceRow) -> Prompt:
        """A prompt whose blocks are equal to those of other rows exactly where the trace says so."""
        if not row.block_ids:
            return self.make(row.num_prompt_tokens)
        units: list[int | str] = []
        for block_id in row.block_ids:
            block = random.Random(f"{self._seed}/{block_id}")
            units += block.choices(self._units, k=min(row.block_tokens, row.num_prompt_tokens - len(units)))
        units += self._random.choices(self._units, k=row.num_prompt_tokens - len(units))
        return self._join(units)

    def _join(self, units: Sequence[int | str]) -> Prompt:
        if units and isinstance(units[0], str):
            return " ".join(str(unit) for unit in units)
        return [int(unit) for unit in units]
