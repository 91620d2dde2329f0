"""What a decode worker's cache offers to others, and what it takes from them before it computes a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest

from kvferry.common.request import SamplingParams
from kvferry.kvcache.blocks import hash_blocks, prefix_salt
from kvferry.kvcache.journal import CacheJournal
from kvferry.kvcache.thin import ThinRule
from kvferry.wire.tasks import FetchFrom, LocalTask

from .bench import BLOCK, SPEC, Bench, first_token

PROMPT_TOKENS = 10
SOURCE = FetchFrom(worker_id="p-1", kv_address="p-1:1", num_tokens=8)


def _hashes(tokens: list[int]) -> list[bytes]:
    return hash_blocks(tokens, BLOCK, prefix_salt(SPEC, b""))


@pytest.mark.parametrize("is_handed_over", [True, False])
def test_an_answers_full_blocks_are_published_under_the_hashes_of_the_next_turns_prompt(is_handed_over: bool) -> None:
    bench = Bench()
    journal = CacheJournal()
    journal.add_tier("device", bench.pool.published)
    bench.pool.listener = journal
    journal.router_joined("R")
    list(journal.drain())
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    spec = msgspec.structs.replace(bench.spec("a", PROMPT_TOKENS), sampling=sampling)
    if is_handed_over:
        bench.hand_over(spec, (first_token(0, 9),))
    else:
        bench.send(LocalTask(spec=spec))
    bench.run()
    turn = [*spec.prompt_token_ids(), *[9] * 11]  # the last token was never fed
    assert len(bench.pool.match_prefix(_hashes(turn))) == len(turn) // BLOCK == 5
    told = {change.stored[start : start + 16] for _, change in journal.drain() for start in range(0, 80, 16)}
    assert told == set(_hashes(turn))
    assert not bench.pool.match_prefix(_hashes([*spec.prompt_token_ids(), *[8] * 11])[2:])


class _Fetches:
    """Ends when the test says so."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[list[bytes], Callable[[], None]]] = {}

    def begin(
        self, key: str, hashes: Sequence[bytes], source: FetchFrom, rule: ThinRule, done: Callable[[], None]
    ) -> bool:
        self.begun[key] = (list(hashes), done)
        return True


def test_all_choices_of_a_resumed_prompt_wait_for_its_fetch_and_begin_behind_it() -> None:
    bench, fetches = Bench(), _Fetches()
    bench.role.fetches = fetches  # type: ignore[assignment]
    bench.send(LocalTask(spec=bench.spec("a", PROMPT_TOKENS, n=2, outputs=([5], [6])), fetch=SOURCE))
    assert bench.role.schedule() is None
    fetches.begun["local a"][1]()
    batch = bench.role.schedule()
    assert batch is not None and {row.seq.choice for row in batch.rows} == {0, 1}


def test_a_local_prompt_waits_for_its_fetch_while_others_run() -> None:
    bench, fetches = Bench(), _Fetches()
    bench.role.fetches = fetches  # type: ignore[assignment]
    spec = bench.spec("a", PROMPT_TOKENS)
    bench.send(LocalTask(spec=spec, fetch=SOURCE))
    hashes, fetched = fetches.begun["local a"]
    assert hashes == _hashes(spec.prompt_token_ids())
    assert bench.role.schedule() is None
    bench.send(LocalTask(spec=bench.spec("b", 3)))
    batch = bench.role.schedule()
    assert batch is not None and [row.seq.request_id for row in batch.rows] == ["b"]
    bench.complete(batch)
    blocks = bench.pool.allocate(2)
    for block, block_hash in zip(blocks, hashes, strict=True):
        bench.pool.publish(block, block_hash)
    bench.pool.free(blocks)
    fetched()
    batch = bench.role.schedule()
    assert batch is not None
    assert [row.start for row in batch.rows if row.seq.request_id == "a"] == [2 * BLOCK]
    bench.complete(batch)
    bench.check()
