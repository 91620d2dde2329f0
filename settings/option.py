"""An `Option` says how a setting looks on the command line, and which commands take it."""

from __future__ import annotations

from dataclasses import dataclass

SERVE = ("serve",)
ROUTER = ("router",)
WORKERS = ("prefill", "decode")
ENGINES = SERVE + WORKERS
FRONTS = SERVE + ROUTER
ALL = SERVE + ROUTER + WORKERS


@dataclass(frozen=True, slots=True)
class Option:
    """A setting's looks on the command line: its group, its help (of a switch: what --no- does), who takes it."""

    panel: str
    help: str
    on: tuple[str, ...]
    flag: str = ""  # where it is not the field's name
    short: str = ""  # another flag for it, as vLLM has it
