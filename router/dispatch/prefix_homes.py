"""One of a request's two workers retains its prompt's KV for the requests to come, so that memory holds it once.

    placed ─> held by one of the two for an earlier turn: that one retains it
              else: the one that has retained less of late, for the room that it has

After a handoff both have the whole prompt. The one that does not retain it evicts its copy before all else, and takes
it to no lower tier; until then the copy is a hit as any other. Nothing depends on it but the time that prompts take.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ..state.pools import Pools
from ..state.request import RouterRequest
from ..state.worker import RouterWorker

_MAX_PROMPTS = 1 << 17
_MAX_LOOKUPS = 256  # blocks of a prompt's known beginning, from its end


class PrefixHomes:
    """`PrefixHomes` knows the session that retains each prompt, by its last block. What it forgets, it decides anew."""

    def __init__(self, pools: Pools, max_prompts: int = _MAX_PROMPTS) -> None:
        self._pools = pools
        self._session_of: OrderedDict[bytes, int] = OrderedDict()  # by a prompt's last full block; oldest first
        self._max_prompts = max_prompts
        self._kept: dict[int, float] = {}  # by session: room that was filled of late, as a share of all

    def decode_retains(self, request: RouterRequest, prefill: RouterWorker, decode: RouterWorker) -> bool | None:
        """Return whether the decode worker retains the prompt. None: there is nothing to retain."""
        hashes = request.block_hashes
        if not hashes:
            return None
        found = self._pools.held_blocks(hashes, request.num_prompt_tokens)
        mine, theirs = prefill.link.number, decode.link.number
        held = max(found.get(mine, 0), found.get(theirs, 0))
        home = self._known(hashes[max(0, held - _MAX_LOOKUPS) : held], (mine, theirs))
        if home is None:
            home = min(mine, theirs, key=lambda session: self._kept.get(session, 0.0))
        self._count(prefill if home == mine else decode, hashes, found.get(home, 0))
        return home == theirs

    def note_local(self, request: RouterRequest, decode: RouterWorker) -> None:
        """Note that the decode worker computes the prompt: there is no other copy."""
        hashes = request.block_hashes
        if hashes:
            found = self._pools.held_blocks(hashes, request.num_prompt_tokens)
            self._count(decode, hashes, found.get(decode.link.number, 0))

    def _known(self, hashes: Sequence[bytes], sessions: tuple[int, int]) -> int | None:
        """Return the session that retains the longest of the prompts that this one goes on from."""
        for block_hash in reversed(hashes):
            session = self._session_of.get(block_hash)
            if session is not None:
                return session if session in sessions else None
        return None

    def _count(self, home: RouterWorker, hashes: Sequence[bytes], num_held: int) -> None:
        session, kept = home.link.number, self._kept
        self._session_of[hashes[-1]] = session
        self._session_of.move_to_end(hashes[-1])
        if len(self._session_of) > self._max_prompts:
            self._session_of.popitem(last=False)
        kept[session] = kept.get(session, 0.0) + (len(hashes) - num_held) / _room(home)
        if kept[session] > 1.0:  # what was before is evicted by and by
            self._kept = {one: share / 2 for one, share in kept.items() if self._pools.at(one) is not None}


def _room(worker: RouterWorker) -> int:
    """Return the blocks that hold, or may hold, what nobody uses now; in host memory those that do."""
    status = worker.status
    return max(1, status.num_free_blocks + status.host_blocks if status is not None else worker.hello.num_blocks)
