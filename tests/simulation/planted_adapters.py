"""Planted bugs of adapters: KV and slots that are another one's."""

from __future__ import annotations

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import Sequence
from kvferry.decode import known_kv
from kvferry.kvcache import contents
from kvferry.kvcache.blocks import prefix_salt
from kvferry.prefill import role as prefill_role
from kvferry.router.dispatch import prefix_fetch
from kvferry.worker.adapters import AdapterCache, _Held

from .planting import Planted


def _salt_of_tenant(spec: KVCacheSpec, cache_salt: bytes, adapter: str = "") -> bytes:
    """A tenant's adapters find each other's blocks."""
    return prefix_salt(spec, cache_salt)


def _any_victim(self: AdapterCache, begun: set[str], live: dict[str, None], *, is_late: bool) -> _Held | None:
    """The least recently used makes way, whoever computes with it."""
    return next((held for held in self._known.values() if held.slot is not None), None)


def _give_at_once(self: AdapterCache, held: _Held, begun: set[str], live: dict[str, None]) -> bool:
    """A slot is used before anything is in it."""
    has_slot = _give_slot(self, held, begun, live)
    if has_slot:
        held.slot = next(slot for slot, one in enumerate(self._slots) if one is held)
    return has_slot


_give_slot = AdapterCache._give_slot


BUGS = (
    Planted(
        "the salt forgets the adapter",
        frozenset({"F2", "H2"}),
        patches=tuple(
            (module, "prefix_salt", _salt_of_tenant) for module in (known_kv, contents, prefill_role, prefix_fetch)
        ),
    ),
    Planted("a running adapter loses its slot", frozenset({"L1"}), patches=((AdapterCache, "_victim", _any_victim),)),
    Planted("a slot is used too early", frozenset({"L1"}), patches=((AdapterCache, "_give_slot", _give_at_once),)),
    Planted(
        "nobody waits for an adapter",
        frozenset({"L1"}),
        patches=((Sequence, "awaits_adapter", property(lambda seq: False)),),
    ),
)
