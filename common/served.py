"""A worker serves requests of one model, with the grammars and adapters that it can have; others it refuses by name.

spec ─> why_not: what it asks for and is not served here
     ─> grammar, adapter: it begins to be made ready, if nobody has begun ─> failed_part: it cannot be had
"""

from __future__ import annotations

from dataclasses import dataclass

from .adapter import Adapters, HeldAdapter
from .grammar import CompiledGrammar, Grammars
from .request import RequestSpec

UNSERVED = ("model", "adapter", "grammar")  # reasons of `why_not`: all workers of a router say the same


@dataclass(frozen=True, slots=True)
class Served:
    """`Served` is what one worker serves, in either role."""

    model: str = ""  # as requests name it
    grammars: Grammars | None = None  # None: those that ask for one are refused
    adapters: Adapters | None = None  # as `grammars`

    def why_not(self, spec: RequestSpec) -> tuple[str, str] | None:
        """Say what a request asks for that is not served, and the words for it; None: nothing."""
        if spec.model not in ("", self.model):
            return "model", f"{spec.model!r} is asked for, this worker serves {self.model!r}"
        if spec.adapter and self.adapters is None:
            return "adapter", f"adapter {spec.adapter} is asked for, this version applies none"
        if spec.grammar is not None and self.grammars is None:
            return "grammar", f"a grammar ({spec.grammar.kind!r}) is asked for, this version follows none"
        return None

    def grammar(self, spec: RequestSpec, *, is_awaited: bool) -> CompiledGrammar | None:
        """Return the grammar that answers follow, by `Grammars.get`; None: they follow none, or none is followed."""
        asked, grammars = spec.grammar, self.grammars
        return None if asked is None or grammars is None else grammars.get(asked, is_awaited=is_awaited)

    def adapter(self, spec: RequestSpec) -> HeldAdapter | None:
        """Return the adapter that a request names, loaded from now on; None: it names none, or none are applied."""
        if not spec.adapter or self.adapters is None:
            return None
        return self.adapters.get(spec.adapter, spec.adapter_path)


PLAIN = Served()  # a model without a name, and neither grammars nor adapters


def is_expired(spec: RequestSpec) -> bool:
    """Tell whether a request came when its time was over: nobody waits for it."""
    return spec.remaining_s is not None and spec.remaining_s <= 0


def failed_part(grammar: CompiledGrammar | None, adapter: HeldAdapter | None) -> tuple[str, str] | None:
    """Say which of these failed to be made ready, and why, as `Served.why_not` does; None: neither has."""
    if grammar is not None and grammar.failure:
        return "grammar", f"the grammar that is asked for cannot be followed: {grammar.failure}"
    if adapter is not None and adapter.failure:
        return "adapter", f"the adapter that is asked for cannot be loaded: {adapter.failure}"
    return None
