"""Answers out of lower tiers equal computed ones: real engines, real files, pools that keep next to nothing."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvferry.common.batch import Batch
from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.common.request import RequestId, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.engine.disk import open_prefix_cache
from kvferry.engine.engine import Engine
from kvferry.engine.ranks import group as rank_group
from kvferry.engine.ranks.group import RankGroup
from kvferry.kvcache.blocks import BlockPool, prefix_salt
from kvferry.prefill.scheduler import PrefillScheduler
from kvferry.tests.fake_clock import FakeClock

from ..checkpoints import write_checkpoint
from ..engine_driver import GREEDY, Driver, engine_config, make_engine, prompts
from ..forks import Forks

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32
ANSWER_S = 60.0
# Five conversations of two turns each; a pool of 8 blocks holds one of them.
FIRST = prompts([70, 81, 64, 75, 90])
NUM_BLOCKS = 8


class _Worker:
    """One engine, its prefix cache, and a scheduler of either role."""

    def __init__(self, model_dir: Path, role: str, fields: dict[str, object], group: RankGroup | None = None) -> None:
        config = engine_config(model_dir, max_num_batched_tokens=48, **fields)
        self.engine = Engine(config, num_blocks=NUM_BLOCKS, group=group, tp_size=config.tensor_parallel_size)
        self.pool = BlockPool(NUM_BLOCKS, 16)
        # Its time stands still and no step's time is learned: what a lower tier has is waited for and promoted.
        self.cache = open_prefix_cache(self.engine, self.pool, FakeClock(), group)
        self.woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.cache.wake_with(lambda: self.woken.put(None))
        self.answer: Callable[[Sequence], list[int]] = self._prefill if role == "prefill" else self._decode
        self._prompts = PrefillScheduler(
            self.pool, FakeClock(), cache=self.cache, max_num_batched_tokens=48, max_num_seqs=4
        )
        self._answers = DecodeScheduler(
            self.pool, self.engine.spec, cache=self.cache, max_num_batched_tokens=48, max_num_seqs=4
        )

    def _batch(self, schedule: Callable[[], Batch | None]) -> Batch:
        """The next step; while a prompt waits for the disk there is none."""
        while (batch := schedule()) is None:
            self.woken.get(timeout=ANSWER_S)
        return batch

    def _decode(self, seq: Sequence) -> list[int]:
        scheduler = self._answers
        scheduler.add(seq)
        while seq.num_output_tokens < seq.sampling.max_tokens:
            batch = self._batch(scheduler.schedule)
            output = self.engine.step(batch)
            scheduler.complete(batch)
            if output.rows and output.rows[0].runs:
                seq.token_ids.append(output.rows[0].runs[0][0].token_id)
        scheduler.remove(seq)
        self._rest()
        return seq.output_token_ids

    def _prefill(self, seq: Sequence) -> list[int]:
        scheduler = self._prompts
        prompt = scheduler.add(seq, prefix_salt(self.engine.spec, b""))
        while seq.num_uncomputed_tokens:
            batch = self._batch(lambda: (scheduler.schedule() or (None,))[0])
            output = self.engine.step(batch)
            self.cache.end()
            scheduler.complete(prompt, batch.num_tokens)
        self.pool.free(seq.block_table)
        seq.token_ids.append(output.rows[0].runs[0][0].token_id)
        self._rest()
        return seq.output_token_ids

    def _rest(self) -> None:
        """Until an idle engine has nothing left to copy, and the disk nothing to write."""
        while True:
            if (batch := self.cache.idle()) is not None:
                self.engine.step(batch)
                self.cache.end()
            elif self.cache.host.num_pinned:
                self.woken.get(timeout=ANSWER_S)
            else:
                break
        self.cache.check()

    def converse(self) -> list[list[int]]:
        """All first turns, then all second turns, each with the first one's answer in its prompt."""
        answers = [self.answer(_sequence(f"a{n}", prompt)) for n, prompt in enumerate(FIRST)]
        again = [[*prompt, *answer, 5, 6, 7] for prompt, answer in zip(FIRST, answers, strict=True)]
        return answers + [self.answer(_sequence(f"b{n}", prompt)) for n, prompt in enumerate(again)]

    def close(self) -> None:
        self.cache.close()


def _sequence(name: str, tokens: list[int]) -> Sequence:
    return Sequence(RequestId(name), 0, 0, list(tokens), len(tokens), GREEDY)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=False)


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    """Without any cache."""
    driver = Driver(make_engine(model_dir, num_blocks=256))
    answers = [driver.generate([driver.add(prompt)])[0] for prompt in FIRST]
    again = [[*prompt, *answer, 5, 6, 7] for prompt, answer in zip(FIRST, answers, strict=True)]
    return answers + [driver.generate([driver.add(prompt)])[0] for prompt in again]


@pytest.fixture(params=["host", "disk"])
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    """Room for all in host memory, or for one conversation there and for all on disk."""
    if request.param == "host":
        return {"host_cache_memory_bytes": 64 * BLOCK_BYTES}
    return {
        "host_cache_memory_bytes": 12 * BLOCK_BYTES,
        "disk_cache_dir": tmp_path / "cache",
        "disk_cache_bytes": 64 * BLOCK_BYTES,
    }


def test_second_turns_from_lower_tiers_give_the_tokens_of_computed_ones(
    model_dir: Path, expected: list[list[int]], tiers: dict[str, object]
) -> None:
    worker = _Worker(model_dir, "decode", tiers)
    try:
        assert worker.converse() == expected
        assert worker.cache.num_promoted_blocks >= 5 * 3
        assert worker.cache.num_failures == 0
        if "disk_cache_dir" in tiers:
            assert worker.cache.disk is not None and worker.cache.disk.num_read_blocks > 0
    finally:
        worker.close()


def test_a_prefill_worker_finds_prompts_in_lower_tiers(
    model_dir: Path, expected: list[list[int]], tiers: dict[str, object]
) -> None:
    worker = _Worker(model_dir, "prefill", tiers)
    try:
        for _ in range(2):
            firsts = [worker.answer(_sequence("p", prompt)) for prompt in FIRST]
            assert firsts == [answer[:1] for answer in expected[: len(FIRST)]]
        assert worker.cache.num_promoted_blocks >= 5 * 3 and worker.cache.num_failures == 0
    finally:
        worker.close()


def test_a_worker_that_starts_again_finds_its_disk(model_dir: Path, expected: list[list[int]], tmp_path: Path) -> None:
    fields: dict[str, object] = {
        "host_cache_memory_bytes": 12 * BLOCK_BYTES,
        "disk_cache_dir": tmp_path / "cache",
        "disk_cache_bytes": 64 * BLOCK_BYTES,
    }
    worker = _Worker(model_dir, "decode", fields)
    first = worker.converse()
    worker.close()
    worker = _Worker(model_dir, "decode", fields)
    try:
        assert worker.cache.num_disk_blocks > 20
        seq = _sequence("again", FIRST[0])
        assert worker.answer(seq) == first[0] and seq.num_cached_tokens == 64
        assert first == expected
    finally:
        worker.close()


def test_spoilt_files_cost_time_and_no_token(model_dir: Path, expected: list[list[int]], tmp_path: Path) -> None:
    fields: dict[str, object] = {
        "host_cache_memory_bytes": 12 * BLOCK_BYTES,
        "disk_cache_dir": tmp_path / "cache",
        "disk_cache_bytes": 64 * BLOCK_BYTES,
    }
    worker = _Worker(model_dir, "decode", fields)
    worker.converse()
    worker.close()
    (path,) = (tmp_path / "cache").iterdir()
    with path.open("r+b") as file:
        file.seek(-64 * BLOCK_BYTES, 2)
        data = file.read()
        file.seek(-64 * BLOCK_BYTES, 2)
        file.write(bytes(byte ^ 1 for byte in data))
    worker = _Worker(model_dir, "decode", fields)
    try:
        with capture_logs() as logs:
            assert worker.converse() == expected
        assert worker.cache.num_failures > 1
        levels = [line["log_level"] for line in logs if line["event"] == "disk_cache_failed"]
        assert levels == ["warning", *["debug"] * (worker.cache.num_failures - 1)], "there may be thousands"
    finally:
        worker.close()


@pytest.fixture(autouse=True)
def ranks_are_forks(monkeypatch: pytest.MonkeyPatch, rank_forks: Forks) -> None:
    monkeypatch.setattr(rank_group, "subprocess", rank_forks)


@pytest.fixture
def group(model_dir: Path, tmp_path: Path) -> Iterator[RankGroup]:
    group = RankGroup.start(engine_config(model_dir, **_two_ranks(tmp_path)), num_blocks=NUM_BLOCKS)
    try:
        yield group
    finally:
        group.close()


def _two_ranks(tmp_path: Path) -> dict[str, object]:
    return {
        "tensor_parallel_size": 2,
        "host_cache_memory_bytes": 12 * BLOCK_BYTES // 2,
        "disk_cache_dir": tmp_path / "cache",
        "disk_cache_bytes": 64 * BLOCK_BYTES // 2,
    }


@pytest.mark.slow
def test_two_ranks_keep_their_parts_in_tiers_of_their_own(
    model_dir: Path, expected: list[list[int]], tmp_path: Path, group: RankGroup
) -> None:
    worker = _Worker(model_dir, "decode", _two_ranks(tmp_path), group)
    try:
        assert worker.converse() == expected
        assert worker.cache.num_promoted_blocks >= 5 * 3 and worker.cache.num_failures == 0
        assert worker.cache.disk is not None and worker.cache.disk.num_read_blocks > 0
        assert len(list((tmp_path / "cache").iterdir())) == 2
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", [False, True])
def test_two_ranks_that_start_again_hold_the_same_blocks_or_none(
    model_dir: Path, expected: list[list[int]], tmp_path: Path, is_lost: bool
) -> None:
    """None where the other rank has not the file that was written with rank 0's: each of its reads would fail."""
    fields = _two_ranks(tmp_path)
    for is_second in (False, True):
        group = RankGroup.start(engine_config(model_dir, **fields), num_blocks=NUM_BLOCKS)
        try:
            worker = _Worker(model_dir, "decode", fields, group)
            assert worker.cache.disk is not None
            assert bool(len(worker.cache.disk.index)) == (is_second and not is_lost)
            assert worker.converse() == expected and worker.cache.num_failures == 0
            worker.close()
        finally:
            group.close()
        if is_lost:
            (path,) = (tmp_path / "cache").glob("*-1of2.0.kv")
            path.unlink()


@pytest.mark.slow
def test_a_rank_that_cannot_open_its_file_ends_the_start_and_says_why(
    model_dir: Path, tmp_path: Path, group: RankGroup
) -> None:
    fingerprint = make_engine(model_dir).spec.fingerprint
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / f"{fingerprint}-1of2.0.kv").mkdir()
    with pytest.raises(WorkerLost, match=r"rank 1: disk_cache_dir: cannot open .*-1of2\.0\.kv: Is a directory"):
        _Worker(model_dir, "decode", _two_ranks(tmp_path), group)


def test_settings_that_contradict_each_other_are_told(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host_cache_memory_bytes = 0 holds 0 of 8,192 bytes"):
        make_engine(model_dir, disk_cache_dir=tmp_path / "cache", host_cache_memory_bytes=0)
    with pytest.raises(ConfigError, match="there is no prefix cache"):
        make_engine(model_dir, disk_cache_dir=tmp_path / "cache", enable_prefix_caching=False)
    assert make_engine(model_dir, host_cache_memory_bytes=None).num_host_blocks == 0, "a CPU's memory is the host's"
    assert make_engine(model_dir, host_cache_memory_bytes=None, disk_cache_dir=tmp_path / "c").num_host_blocks == 64
