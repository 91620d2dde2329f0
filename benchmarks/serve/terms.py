"""The terms of a file of figures: what all of its rows have in common, as they could not be compared without."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kvferry.benchmarks.shared.peers import VLLM_DTYPES
from kvferry.tools.load.environment import Environment


@dataclass(slots=True, frozen=True)
class Terms:
    """The last three are None in a file that was written before they were kept."""

    model: str
    num_cores: int
    max_model_len: int
    client: str
    cpu: str | None = None
    vllm_dtype: str | None = None
    kvferry_flags: str | None = None  # beside those of every measurement

    def completed(self, environments: Sequence[Environment]) -> Terms:
        """Take what a file does not keep from what its rows were measured with."""
        if self.cpu is not None:
            return self
        commands = [shlex.split(environment.command) for environment in environments]
        return replace(
            self,
            cpu=_joined(environment.cpu for environment in environments),
            vllm_dtype=_joined(_flag(words, "--vllm-dtype", VLLM_DTYPES[0]) for words in commands),
            kvferry_flags=_joined(_flag(words, "--kvferry-flags", "") for words in commands),
        )


def _joined(values: Iterable[str]) -> str:
    """All that there are: where rows differ, no new row is measured on their terms."""
    return " | ".join(sorted(set(values)))


def _flag(words: Sequence[str], name: str, default: str) -> str:
    given = [after for word, after in pairwise(words) if word == name]
    given += [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    return given[-1] if given else default
