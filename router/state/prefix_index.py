"""The index knows which sessions hold which blocks, by chained hash, from what their workers have told in order.

    CacheChange ─> on_change        worker lost ─> forget        a prompt's hashes ─> match: leading blocks by session

One table for the fleet maps a block to the set of its holders, which is a bit mask: a prompt costs one look-up and one
AND for each block that anybody has of it, whatever the number of workers. A session owns one bit. To forget a session
takes its bit out of `_alive` and touches no block; the bit is wiped out of the table piece by piece while changes come
in, and only then given to another session. The table is cut into shards, so that neither a wipe nor a hash table that
grows stops the router.

Keys are the first 64 bits of a hash. A match is a hint: a worker that is found to lack a block computes it, so what is
missing, late or wrong here costs time and nothing else. A gap in a session's numbers drops what was known of it, until
it tells everything anew (seq 0).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...kvcache.thin import ThinRule, num_usable
from ...wire.workers import CacheChange

HASH_BYTES = 16
MAX_BLOCKS = 1 << 24  # of one session, all tiers together: more is nobody's cache
_TIERS = {"device": 1, "host": 2, "disk": 4}
_DEVICE = 1
_NUM_SHARDS = 16384
_CHUNK = 32  # of a prompt's hashes are unpacked at a time
_WIPE_ENTRIES = 512  # looked at for each change, while a dead session's bit is wiped out
_MAX_MASKS = 1 << 16
_TWIN = (1 << 64) - 1  # what a key and its twin's differ by


@dataclass(slots=True, eq=False)
class _Session:
    """The blocks of one worker's session, as it has told of them."""

    slot: int
    bit: int  # 1 << slot: the mask of blocks that nobody else has
    next_seq: int = 0
    num_blocks: int = 0
    # Of the blocks in another tier than the device, all tiers that they are in. What is not here is on the device.
    tiers: dict[int, int] = field(default_factory=dict)


class PrefixIndex:
    """`PrefixIndex` knows one router's workers. Not thread-safe: it lives on the router's loop."""

    def __init__(self, num_shards: int = _NUM_SHARDS) -> None:
        """`num_shards`: a power of two."""
        self._shards: list[dict[int, int]] = [{}] * num_shards  # key -> mask of its holders; all one until stored to
        self._which = num_shards - 1
        self._sessions: dict[int, _Session] = {}
        self._session_of: dict[int, int] = {}  # slot -> session
        self._alive = 0  # the bits of all sessions
        self._dying = 0  # bits that are being wiped out
        self._dead: list[tuple[int, int]] = []  # slots, and how many shards had been wiped when they died
        self._free_slots: list[int] = []
        self._num_wiped = 0  # shards, since the start
        self._masks: dict[int, int] = {}  # equal masks are one object: most blocks have one holder, or one pair
        self.num_gaps = 0

    def on_change(self, session: int, change: CacheChange) -> None:
        """Take a change from a worker's session, in the order in which it was sent."""
        if change.seq == 0:
            self.forget(session)
            self._sessions[session] = self._new_session(session)
        state = self._sessions.get(session)
        if state is None:
            return  # it had a gap
        if change.seq != state.next_seq or len(change.stored) % HASH_BYTES or len(change.evicted) % HASH_BYTES:
            self.num_gaps += 1
            self.forget(session)
            return
        state.next_seq += 1
        tier = _TIERS.get(change.tier)
        if tier is not None:
            self._store(state, tier, _keys(change.stored))
            self._evict(state, tier, _keys(change.evicted))
        if state.num_blocks > MAX_BLOCKS:
            self.forget(session)
        if self._dead:
            self._wipe()

    def forget(self, session: int) -> None:
        """The session has ended, or is not understood. Idempotent."""
        state = self._sessions.pop(session, None)
        if state is not None:
            del self._session_of[state.slot]
            self._alive &= ~state.bit
            self._dying |= state.bit
            self._dead.append((state.slot, self._num_wiped))

    def match(self, hashes: Sequence[bytes], num_thin: ThinRule | None = None) -> Mapping[int, int]:
        """Return from how many leading blocks each session can go on, in any tier; those that lack the first are left
        out. `num_thin`: None: none may be thin.
        """
        if num_thin is not None and num_thin(len(hashes)):
            return self._match_in_any_form(hashes, num_thin)
        found: dict[int, int] = {}
        shards, which, held, depth = self._shards, self._which, self._alive, 0
        for start in range(0, len(hashes), _CHUNK):
            for key in _keys(b"".join(hashes[start : start + _CHUNK])):
                holders = held & shards[key & which].get(key, 0)
                if holders != held:
                    if depth:
                        self._tell(held ^ holders, depth, found)
                    held = holders
                if not held:
                    return found
                depth += 1
        self._tell(held, depth, found)
        return found

    def _match_in_any_form(self, hashes: Sequence[bytes], num_thin: ThinRule) -> Mapping[int, int]:
        """Do the same where blocks may be thin, as those of long prompts: a key's twin is that of its thin one."""
        found: dict[int, int] = {}
        shards, which, held = self._shards, self._which, self._alive
        thin: dict[int, list[int]] = {}  # places, by slot
        for place, key in enumerate(_keys(b"".join(hashes))):
            other = key ^ _TWIN
            whole = held & shards[key & which].get(key, 0)
            either = whole | held & shards[other & which].get(other, 0)
            self._tell_usable(held ^ either, place, thin, num_thin, found)
            for slot in _bits(either ^ whole):
                thin.setdefault(slot, []).append(place)
            held = either
            if not held:
                return found
        self._tell_usable(held, len(hashes), thin, num_thin, found)
        return found

    def _tell_usable(
        self, slots: int, depth: int, thin: Mapping[int, list[int]], num_thin: ThinRule, found: dict[int, int]
    ) -> None:
        for slot in _bits(slots):
            if count := num_usable(depth, thin.get(slot, ()), num_thin):
                found[self._session_of[slot]] = count

    def num_blocks(self, session: int) -> int:
        """Different blocks that the session holds, by what it has told."""
        state = self._sessions.get(session)
        return state.num_blocks if state is not None else 0

    def __len__(self) -> int:
        """Different blocks in the table."""
        return sum(map(len, self._shards))

    # --- the table ------------------------------------------------------------------------------------------------

    def _tell(self, slots: int, depth: int, found: dict[int, int]) -> None:
        if depth:
            for slot in _bits(slots):
                found[self._session_of[slot]] = depth

    def _store(self, state: _Session, tier: int, keys: Sequence[int]) -> None:
        shards, which, bit, tiers = self._shards, self._which, state.bit, state.tiers
        for key in keys:
            shard = shards[key & which]
            mask = shard.get(key)
            is_new = mask is None or not mask & bit
            if tier != _DEVICE or key in tiers:
                tiers[key] = tiers.get(key, 0 if is_new else _DEVICE) | tier
            if is_new:
                if not shard:  # maybe the one that all begin with
                    shard = shards[key & which] = {}
                shard[key] = bit if mask is None else self._shared(mask | bit)
                state.num_blocks += 1

    def _evict(self, state: _Session, tier: int, keys: Sequence[int]) -> None:
        shards, which, bit, tiers = self._shards, self._which, state.bit, state.tiers
        for key in keys:
            if key in tiers or tier != _DEVICE:
                left = tiers.pop(key, _DEVICE) & ~tier
                if left:
                    if left != _DEVICE:
                        tiers[key] = left
                    continue
            shard = shards[key & which]
            mask = shard.get(key)
            if mask is None or not mask & bit:
                continue
            state.num_blocks -= 1
            if mask == bit:
                del shard[key]
            else:
                shard[key] = self._shared(mask ^ bit)

    def _shared(self, mask: int) -> int:
        """The one object that stands for this mask."""
        if len(self._masks) > _MAX_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    # --- slots ----------------------------------------------------------------------------------------------------

    def _new_session(self, session: int) -> _Session:
        slot = self._free_slots.pop() if self._free_slots else len(self._session_of) + len(self._dead)
        self._session_of[slot] = session
        self._alive |= 1 << slot
        return _Session(slot, 1 << slot)

    def _wipe(self) -> None:
        """Go on taking dead bits out of the table; what has been taken out of every shard is a free slot."""
        num_entries = 0
        while self._dead and num_entries < _WIPE_ENTRIES:
            number = self._num_wiped & self._which
            num_entries += 1
            if shard := self._shards[number]:
                num_entries += len(shard)
                self._shards[number] = self._without_dying(shard)
            self._num_wiped += 1
            while self._dead and self._num_wiped - self._dead[0][1] > self._which:
                slot, _ = self._dead.pop(0)
                self._dying &= ~(1 << slot)
                self._free_slots.append(slot)

    def _without_dying(self, shard: dict[int, int]) -> dict[int, int]:
        dying = self._dying
        if not any(mask & dying for mask in shard.values()):
            return shard
        return {
            key: mask if not mask & dying else self._shared(mask & ~dying)
            for key, mask in shard.items()
            if mask & ~dying
        }


def _keys(hashes: bytes) -> Sequence[int]:
    return array("Q", hashes)[::2]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
