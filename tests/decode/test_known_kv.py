"""KV of a sequence that comes back: what lies on the device and what swapping has saved, some of it in thin blocks."""

from __future__ import annotations

import pytest

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.known_kv import KnownKV
from kvferry.kvcache.blocks import BlockPool, hash_blocks, prefix_salt
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.swap import Saved, SwapSpace
from kvferry.kvcache.thin import twin

BLOCK = 4
SPEC = KVCacheSpec(
    model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32", windows=(0, 6)
)
TOKENS = list(range(30))  # seven full blocks, and two tokens
SAVED = Saved(num_tokens=29, slots={5: 0, 6: 1, 7: 2})  # behind it no window reaches five blocks


class _Swap(SwapSpace):
    """Has saved the sequence's last blocks."""

    def saved(self, seq: Sequence) -> Saved:
        return SAVED


@pytest.mark.parametrize(
    ("forms", "num_hits", "loads", "num_thin"),
    [
        ("tttww", 5, [5, 6, 7], 3),
        ("ttttt", 5, [5, 6, 7], 5),
        ("wwwww", 5, [5, 6, 7], 0),
        ("tt-ww", 0, [], 0),  # behind two blocks windows reach both
        ("wtww-", 4, [], 2),
        ("wwtw-", 2, [], 0),  # behind four they reach the third
        ("-wwww", 0, [], 0),
    ],
)
def test_a_sequence_goes_on_from_what_is_whole_as_far_as_windows_reach(
    forms: str, num_hits: int, loads: list[int], num_thin: int
) -> None:
    pool = BlockPool(16, BLOCK)
    hashes = hash_blocks(TOKENS, BLOCK, prefix_salt(SPEC, b""))
    names = {place: hashes[place] if form == "w" else twin(hashes[place]) for place, form in enumerate(forms)}
    for place, block in enumerate(pool.allocate(len(forms))):
        if forms[place] != "-":
            pool.publish(block, names[place])
    seq = Sequence(RequestId("r"), 0, 0, TOKENS, 20, SamplingParams())
    known = KnownKV(pool, SPEC, PrefixCache(pool, spec=SPEC), _Swap(0))
    found, places = known.find(seq)
    assert (len(found.hits), places, found.num_thin) == (num_hits, loads, num_thin)
    assert list(found.hits.values()) == pool.match_prefix([names[place] for place in range(num_hits)])


@pytest.mark.parametrize(("num_outputs", "num_reused"), [(0, 0), (1, len(TOKENS) // BLOCK)])
def test_a_prompt_whose_logprobs_are_wanted_is_computed_once_and_not_after_its_answer_has_begun(
    num_outputs: int, num_reused: int
) -> None:
    pool = BlockPool(16, BLOCK)
    params = SamplingParams(prompt_logprobs=1)
    seq = Sequence(RequestId("r"), 0, 0, [*TOKENS, *[7] * num_outputs], len(TOKENS), params)
    known = KnownKV(pool, SPEC, PrefixCache(pool, spec=SPEC), SwapSpace(0))
    assert len(known.reusable_hashes(seq)) == num_reused and known.looks_up(seq) is bool(num_reused)


def test_what_was_saved_of_thin_blocks_is_thin() -> None:
    pool = BlockPool(16, BLOCK)
    seq = Sequence(RequestId("r"), 0, 0, TOKENS, 20, SamplingParams(), num_thin_blocks=6)
    hashes = hash_blocks(TOKENS, BLOCK, prefix_salt(SPEC, b""))
    for block, name in zip(pool.allocate(5), hashes, strict=False):
        pool.publish(block, name)
    found, places = KnownKV(pool, SPEC, PrefixCache(pool, spec=SPEC), _Swap(0)).find(seq)
    assert (len(found.hits), places) == (5, []), "windows reach the sixth block"
