"""The adapters of a worker: which of them have a slot in the engine, which wait for one, and who makes way.

    get ─> wanted ─(a free slot, or the least recently used one)─> loading ─> ready ─> makes way for another one
                                                                     ├─> failed: its requests are refused
                                                                     └─> late: the same, until it comes after all

An adapter with a running sequence keeps its slot. One whose requests wait keeps it too, until another one has waited
for `PATIENCE_S`: then the least recently used takes no new sequences, and makes way when its last one has ended. All of
this is decided where steps are scheduled; loading is the loader's, on a thread of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from ..common.adapter import AdapterLoader, AdapterTask
from ..common.clock import Clock, OwnTime

# Without a slot for so long, an adapter closes another one to new sequences. Shorter: more loads, and steps with fewer
# rows while sequences drain. Longer: the first token of rare adapters comes later under load.
PATIENCE_S = 1.0
# A load that takes longer is not waited for: a file system that does not answer, or a rank. Shorter refuses what a slow
# disk brings in the end; longer than five times the router's `STALL_LIMIT_S`, and it gives up its requests before.
LOAD_LIMIT_S = 60.0

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """Implements `common.adapter.HeldAdapter`."""

    digest: str
    path: str
    slot: int | None = None
    is_loading: bool = False
    gives_way: bool = False
    failure: str = ""
    wanted_s: float | None = None  # since when it has been waiting for a slot
    late_s: float = 0.0  # when its load counts as late, by the time in which we have run

    @property
    def is_open(self) -> bool:
        return self.slot is not None and not self.gives_way


class AdapterCache:
    """Implements `common.adapter.Adapters`. All calls come with the worker's lock held."""

    def __init__(self, loader: AdapterLoader, clock: Clock) -> None:
        self._loader = loader
        self._clock = clock
        self._own_time = OwnTime(clock)
        self._known: OrderedDict[str, _Held] = OrderedDict()  # by digest, the latest used last
        self._slots: list[_Held | None] = [None] * loader.num_slots  # ready or loading there
        self._host: OrderedDict[str, None] = OrderedDict()  # digests in host memory, the latest used last
        self.is_settled = True  # nobody waits for a slot
        self.num_loads = 0

    def get(self, digest: str, path: str) -> _Held:
        held = self._known.get(digest)
        if held is None or (held.failure and not held.is_loading):  # its file may have been mended
            held = self._known[digest] = _Held(digest, path)
        self._known.move_to_end(digest)
        if digest in self._host:
            self._host.move_to_end(digest)
        held.path = path  # from there, if it is to be loaded again: where it was may be gone
        if held.slot is None:
            self.is_settled = False
        return held

    @property
    def loaded(self) -> tuple[str, ...]:
        """Return the digests of those that have a slot."""
        return tuple(held.digest for held in self._slots if held is not None and held.slot is not None)

    @property
    def num_loading(self) -> int:
        """Return how many are being loaded within their limit: whoever waits for one is no sign of a standstill."""
        return sum(held is not None and held.is_loading and not held.failure for held in self._slots)

    def serve(self, begun: set[str], waiting: Iterable[str]) -> None:
        """Take what was loaded, and load what is wanted. `begun`: those that sequences or the running step compute
        with; `waiting`: those of all other requests, in their order.
        """
        for result in self._loader.results():
            self._on_result(result.digest, result.slot, result.error)
        if self.is_settled:
            return
        live = dict.fromkeys([*sorted(begun), *waiting])
        wanted = [held for digest in live if (held := self._known.get(digest)) is not None and self._lacks(held)]
        if self._refuse_late(wanted):
            wanted = []
        for held in wanted:
            if not self._give_slot(held, begun, live):
                break
        else:
            for one in self._slots:
                if one is not None:
                    one.gives_way = False
        self.is_settled = not wanted and not any(held is not None and held.is_loading for held in self._slots)
        self._forget_unused(live)

    def _lacks(self, held: _Held) -> bool:
        return held.slot is None and not held.is_loading and not held.failure

    def _on_result(self, digest: str, slot: int, error: str) -> None:
        held = self._slots[slot]
        assert held is not None and held.digest == digest and held.is_loading, (digest, slot)
        held.is_loading = False
        if not error:
            held.slot, held.wanted_s, held.failure = slot, None, ""
            return
        log.warning("adapter_failed", adapter=digest, path=held.path, error=error)
        held.failure, self._slots[slot] = error, None
        if digest in self._host:  # on a rank where it was read: the next one to be forgotten
            self._host.move_to_end(digest, last=False)

    def _refuse_late(self, wanted: list[_Held]) -> bool:
        """Let nobody wait for a load that is late, nor behind it: what loads is one thread, which is not to be had."""
        now_s = self._own_time.now()
        late = [held for held in self._slots if held is not None and held.is_loading and now_s >= held.late_s]
        for held in late:
            if not held.failure:
                held.failure = f"loading {held.path} takes more than {LOAD_LIMIT_S:g} s"
                log.warning("adapter_late", adapter=held.digest, path=held.path, limit_s=LOAD_LIMIT_S)
        for held in wanted if late else ():
            held.failure = f"{late[0].failure}, and it would be loaded after that"
        return bool(late)

    def _give_slot(self, held: _Held, begun: set[str], live: dict[str, None]) -> bool:
        """Begin to load it. False: every slot is kept."""
        now = self._clock.now()
        held.wanted_s = now if held.wanted_s is None else held.wanted_s
        if None not in self._slots:
            victim = self._victim(begun, live, is_late=now >= held.wanted_s + PATIENCE_S)
            if victim is None:
                return False
            assert victim.slot is not None
            self._slots[victim.slot], victim.slot, victim.gives_way = None, None, False
        slot = self._slots.index(None)
        self._slots[slot], held.is_loading = held, True
        held.late_s = self._own_time.now() + LOAD_LIMIT_S
        self.num_loads += 1
        self._loader.submit(AdapterTask(held.digest, held.path, slot, self._keep(held.digest)))
        return True

    def _victim(self, begun: set[str], live: dict[str, None], *, is_late: bool) -> _Held | None:
        """Return who makes way now: the least recently used of those that nobody asks for, or has begun with."""
        ready = [held for held in self._known.values() if held.slot is not None and held.digest not in begun]
        unasked = next((held for held in ready if held.digest not in live), None)
        if unasked is not None or not is_late:
            return unasked
        if ready:
            return ready[0]
        oldest = next((held for held in self._known.values() if held.slot is not None), None)
        if oldest is not None and not any(held is not None and held.gives_way for held in self._slots):
            oldest.gives_way = True
        return None

    def _keep(self, digest: str) -> tuple[str, ...]:
        """Note that host memory has it from now on. Returns which ones it has no longer."""
        self._host[digest] = None
        forgotten = []
        while len(self._host) > self._loader.num_host:
            forgotten.append(self._host.popitem(last=False)[0])
        return tuple(forgotten)

    def _forget_unused(self, live: dict[str, None]) -> None:
        """Whoever asks for one again waits from then on."""
        known = [held for held in self._known.values() if held.slot is None and not held.is_loading]
        for held in known:
            if held.digest not in live:
                del self._known[held.digest]

    def check(self) -> None:
        """Assert that slots and adapters agree, and that host memory has no more than it may."""
        for slot, held in enumerate(self._slots):
            assert held is None or (held.slot == slot) != held.is_loading, (slot, held)
            assert held is None or self._known[held.digest] is held
        for held in self._known.values():
            assert held.slot is None or self._slots[held.slot] is held
            assert not (held.failure and held.slot is not None)
        assert len(self._host) <= self._loader.num_host
