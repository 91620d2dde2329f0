"""Which of a prompt's blocks can be gone on from, where some lack what windows no longer reach."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.thin import leading, num_thin_of, thin_rule, twin, usable
from kvferry.kvcache.tiers import TierIndex

BLOCK = 4
HASHES = [bytes([n]) * 16 for n in range(12)]
SPEC = KVCacheSpec(
    model="m",
    num_layers=3,
    num_kv_heads=1,
    head_dim=8,
    block_size=BLOCK,
    dtype="float32",
    windows=(0, 6),
    window_slack=9,
)
RULE = thin_rule(SPEC)
FORMS = st.sampled_from(["none", "whole", "thin", "both"])


def _known(forms: list[str]) -> set[bytes]:
    whole = {HASHES[place] for place, form in enumerate(forms) if form in ("whole", "both")}
    return whole | {twin(HASHES[place]) for place, form in enumerate(forms) if form in ("thin", "both")}


def test_twins_are_each_others() -> None:
    for name in HASHES:
        assert twin(name) not in HASHES and twin(twin(name)) == name


@given(st.lists(FORMS, max_size=len(HASHES)))
def test_the_longest_prefix_is_found_whose_windows_lie_in_whole_blocks(forms: list[str]) -> None:
    known, hashes = _known(forms), HASHES[: len(forms)]
    names = usable(hashes, known.__contains__, RULE)
    assert known.issuperset(names)

    def can_go_on_from(count: int) -> bool:
        reached = range(RULE(count), count)
        return "none" not in forms[:count] and all(forms[place] != "thin" for place in reached)

    assert len(names) == max(count for count in range(len(forms) + 1) if can_go_on_from(count))
    thin = [place for place, name in enumerate(names) if name != hashes[place]]
    assert num_thin_of(names, hashes) == (thin[-1] + 1 if thin else 0) <= RULE(len(names))


def test_windows_reach_no_further_than_the_blocks_before_the_next_token() -> None:
    for num_tokens, num_thin in ((0, 0), (6, 0), (9, 0), (10, 1), (13, 1), (14, 2), (46, 10)):
        assert SPEC.num_thin_blocks(num_tokens) == num_thin
    assert SPEC.num_left_out(46) == SPEC.num_thin_blocks(46 - 9) == 7
    assert SPEC.num_pages(10, 7) == 30 - 7 and [SPEC.is_windowed(layer) for layer in range(3)] == [False, True, False]


def test_a_form_that_will_do_is_taken_where_the_other_is_not_there() -> None:
    known = _known(["thin", "both", "thin", "whole"])
    assert leading(HASHES, known.__contains__, 3) == [twin(HASHES[0]), HASHES[1], twin(HASHES[2]), HASHES[3]]
    assert leading(HASHES, known.__contains__, 2) == [twin(HASHES[0]), HASHES[1]]


def _cache(forms: list[str], *, of_device: range, num_blocks: int = 16) -> PrefixCache:
    """Blocks in these forms: those in `of_device` are there, the others in host memory."""
    pool, host = BlockPool(num_blocks, BLOCK), TierIndex(16)
    for place, form in enumerate(forms):
        name = HASHES[place] if form == "whole" else twin(HASHES[place])
        if place in of_device:
            [block] = pool.allocate(1)
            pool.publish(block, name)
            pool.free([block])
        else:
            host.reserve(name)
            host.fill(name)
    return PrefixCache(pool, host=host, spec=SPEC)


def test_thin_blocks_are_found_and_promoted_in_every_tier() -> None:
    forms = ["thin"] * 4 + ["whole"] * 4
    found = _cache(forms, of_device=range(2, 6)).find(HASHES)
    assert (list(found.hits), list(found.promoted)) == ([2, 3, 4, 5], [0, 1, 6, 7])
    assert (len(found), found.num_thin, found.promoted[0], found.promoted[7]) == (8, 4, twin(HASHES[0]), HASHES[7])


def test_nothing_is_found_where_windows_reach_thin_blocks() -> None:
    cache = _cache(["whole", "thin", "thin", "whole"], of_device=range(4))
    assert len(cache.find(HASHES)) == 1, "behind four blocks windows reach the third"
    assert len(cache.find(HASHES, lambda num_blocks: 3)) == 4, "a reader who goes on elsewhere may have them"
    assert [cache.thin_rule(16)(count) for count in (4, 8, 12)] == [0, 0, 0], "a prompt of 16 tokens is shipped whole"
    assert [cache.thin_rule(46)(count) for count in (4, 8, 12)] == [2, 6, 7], "of a longer one seven blocks are not"


def test_what_is_promoted_for_a_reader_is_known_by_the_name_of_its_form() -> None:
    cache, done = _cache(["thin", "thin", "whole"], of_device=range(0)), list[int]()
    assert cache.lift(HASHES[:3], 2, lambda: done.append(1))
    cache.begin(None)
    cache.end()
    assert done and len(cache.find(HASHES[:3], lambda num_blocks: 2).hits) == 3
