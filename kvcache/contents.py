"""A request's contents: the tokens that its sequences begin with, and the hashes that its prompt's blocks are found by.

Roles and receivers ask for both through `Contents`, and never look at a token themselves. So a simulation whose
requests are mere lengths with known hashes drives the same code (`simulator/jobs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..common.kv_spec import KVCacheSpec
from ..common.request import RequestSpec, Sequence
from .blocks import hash_blocks, prefix_salt


class Contents(Protocol):
    """`Contents` reads requests."""

    def prompt_hashes(self, spec: RequestSpec) -> list[bytes]:
        """Return the hashes of the prompt's full blocks."""
        ...

    def sequence(
        self, spec: RequestSpec, choice: int, outputs: Iterable[int] = (), hashes: Iterable[bytes] = ()
    ) -> Sequence:
        """Make a choice's sequence, without blocks. `outputs`: tokens of its answer that are known. `hashes`: of its
        leading full blocks, where they were asked for before.
        """
        ...


class TokenContents:
    """Implements `Contents` by the token ids that a request brings. `spec`: of the worker's KV."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec

    def prompt_hashes(self, spec: RequestSpec) -> list[bytes]:
        salt = prefix_salt(self._spec, spec.cache_salt, spec.adapter)
        return hash_blocks(spec.prompt_token_ids(), self._spec.block_size, salt)

    def sequence(
        self, spec: RequestSpec, choice: int, outputs: Iterable[int] = (), hashes: Iterable[bytes] = ()
    ) -> Sequence:
        seq = Sequence.of(spec, choice, outputs)
        seq.block_hashes = list(hashes)  # those of the following blocks go on from there
        return seq
