"""Two ranks as real processes: same tokens as one, payloads in order, and no rank outlives another."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import transformers

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.common.request import Pooling, SamplingParams
from kvferry.common.vectors import values_of
from kvferry.engine import follower
from kvferry.engine.engine import Engine
from kvferry.engine.ranks import communicator, group
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.ranks.frames import FrameKind, FrameSocket, StartFollower
from kvferry.engine.ranks.group import RankGroup

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, engine_config, make_engine, prompts
from ...forks import Forks
from ...kvcache.test_host_slots import swapped_in_the_middle, undisturbed
from ...quantized import SHAPE, write_pair
from ...transformers_checkpoints import SMALL, STATES, write_model
from .threads import on_ranks

ANSWER_S = 60.0


class EchoHandler:
    """A follower's handler that sends back what happens to it; payload b"die" ends its process."""

    def __init__(self, engine: Engine, config: bytes, send: Callable[[bytes], None]) -> None:
        self._send = send
        heads = engine.kv_pages.shape[3]
        send(b"made %s with %d heads of %d" % (config, heads, engine.spec.num_kv_heads))

    def on_user(self, payload: bytes) -> None:
        if payload == b"die":
            os._exit(3)
        if payload == b"fail":
            raise ConfigError("asked to fail")
        self._send(b"user " + payload)

    def on_layer(self, layer_id: int) -> None:
        self._send(b"layer %d" % layer_id)

    def close(self) -> None:
        self._send(b"closed")


class RankPair:
    """Two ranks, of which rank 0 is this process."""

    def __init__(self, model_dir: Path, **fields: object) -> None:
        self.inbox: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        config = engine_config(model_dir, tensor_parallel_size=2, swap_space=1 << 20, **fields)
        self.group = RankGroup.start(
            config,
            num_blocks=64,
            handler="kvferry.tests.engine.ranks.test_group:EchoHandler",
            handler_config=b"this",
            on_message=lambda rank, payload: self.inbox.put((rank, payload)),
            on_lost=self.lost.put,
        )
        self.engine = Engine(config, tp_size=2, num_blocks=64, group=self.group)

    def received(self) -> bytes:
        rank, payload = self.inbox.get(timeout=ANSWER_S)
        assert rank == 1
        return payload


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "qwen2", tokenizer=False, vocab_size=511)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, rank_forks: Forks) -> None:
    """Have the other rank import nothing anew, where its start is not what is tested."""
    monkeypatch.setattr(group, "subprocess", rank_forks)


@pytest.fixture
def pair(model_dir: Path) -> Iterator[RankPair]:
    pair = RankPair(model_dir)
    try:
        yield pair
    finally:
        pair.group.close()


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one_and_payloads_keep_their_place(pair: RankPair, model_dir: Path) -> None:
    assert pair.received() == b"made this with 1 heads of 2"
    assert pair.engine.kv_pages.shape[3] == 1
    asked = prompts([1, 20, 33], 511)
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, seed=5),
    ]
    answers = []
    for engine in (pair.engine, make_engine(model_dir)):
        driver = Driver(engine)
        seqs = [driver.add(prompt, params) for prompt, params in zip(asked, sampling, strict=True)]
        answers.append(driver.generate(seqs, chunk=16))
    assert answers[0] == answers[1]
    assert pair.engine.spec.fingerprint == make_engine(model_dir).spec.fingerprint

    while not pair.inbox.empty():
        assert pair.received().startswith(b"layer")
    pair.group.broadcast(b"before")
    driver = Driver(pair.engine)
    driver.step([(driver.add(asked[0]), 1)])
    pair.group.broadcast(b"after")
    heard = [pair.received() for _ in range(4)]
    while heard[0].startswith(b"layer"):  # of the steps above
        heard = [*heard[1:], pair.received()]
    assert heard == [b"user before", b"layer 0", b"layer 1", b"user after"]
    pair.group.close()
    assert pair.received() == b"closed"
    pair.group.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_every_rank_tells_of_pages_of_states_behind_those_of_layers(tmp_path: Path) -> None:
    pair = RankPair(write_model(tmp_path, transformers.Qwen3_5TextConfig(**SMALL | STATES)), block_size=16)
    told: list[int] = []
    driver = Driver(pair.engine)
    driver.step([(driver.add(range(4, 24)), 20)], told.append)
    pair.group.close()
    assert told == list(range(pair.engine.spec.num_layers)) and len(told) > 2
    assert [pair.received() for _ in range(len(told) + 2)][1:] == [*(b"layer %d" % page for page in told), b"closed"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("name", "asked"), [("awq", None), ("gptq 8 asymmetric", None), (None, "int8"), (None, "int4")]
)
def test_two_ranks_share_quantized_weights(tmp_path: Path, name: str | None, asked: str | None) -> None:
    if name is None:
        model_dir = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE, tie_embeddings=True)
    else:
        model_dir, _ = write_pair(tmp_path, name)
    pair = RankPair(model_dir, quantization=asked)
    answers = []
    for engine in (pair.engine, make_engine(model_dir, 128, quantization=asked)):
        driver = Driver(engine)
        answers.append(driver.generate([driver.add(prompt) for prompt in prompts([1, 20, 33], 250)], chunk=16))
        assert engine.spec.model == pair.engine.spec.model
    pair.group.close()
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_ranks_embed_as_one(pair: RankPair, model_dir: Path) -> None:
    sums = []
    for engine in (pair.engine, make_engine(model_dir)):
        driver = Driver(engine)
        seqs = [driver.add(prompt) for prompt in prompts([1, 20, 33], 511)]
        for seq in seqs:
            seq.samples, seq.pooling = False, Pooling.MEAN
            driver.grow(seq, seq.num_tokens)
        rows = engine.step(Batch([BatchRow(seq, seq.num_tokens) for seq in seqs])).rows
        sums.append([value for row in rows for value in values_of(row.pooled)])
    assert sums[0] == pytest.approx(sums[1], abs=1e-3, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_every_rank_swaps_its_part_of_the_blocks(pair: RankPair, model_dir: Path) -> None:
    assert swapped_in_the_middle(pair.engine) == undisturbed(make_engine(model_dir))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_follower_that_dies_is_a_lost_worker(pair: RankPair) -> None:
    driver = Driver(pair.engine)
    seq = driver.add(prompts([3])[0])
    pair.group.broadcast(b"die")
    with pytest.raises(WorkerLost, match="tensor-parallel"):
        driver.step([(seq, 3)])
    assert pair.lost.get(timeout=ANSWER_S) == "rank 1 ended", "also to whoever waits for nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_rank_that_takes_nothing_any_more_is_lost_and_ended(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_SEND_TIMEOUT_S", "_CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(group, limit, 0.5)
    pair = RankPair(model_dir)
    [pid] = pair.group.pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerLost, match="rank 1 is gone"):
        while True:
            pair.group.broadcast(bytes(1 << 16))
    pair.group.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_wait_for_one_another_longer_than_for_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    store, met = dist.HashStore(), list[int]()  # type: ignore[attr-defined]
    ranks = [Communicator(rank, 2, object(), store=store) for rank in range(2)]  # type: ignore[arg-type]

    def lost() -> None:
        raise WorkerLost("rank 1 ended")

    with pytest.raises(WorkerLost, match="rank 1 ended"):
        ranks[0].meet("loaded", lost)
    with pytest.raises(WorkerLost, match="rank 1 ended"):
        communicator.connect(store, 0, 2, torch.device("cpu"), check=lost)
    monkeypatch.setattr(communicator, "LOAD_TIMEOUT_S", 0.0)
    with pytest.raises(WorkerLost, match="rank 0: others are not loaded after 0 s"):
        ranks[0].meet("loaded")
    monkeypatch.undo()

    def come() -> None:
        ranks[0].meet("ready")
        met.append(0)

    first = threading.Thread(target=come)
    first.start()
    assert not met
    ranks[1].meet("ready")
    first.join(ANSWER_S)
    assert met == [0]
    Communicator().meet("alone")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_followers_error_reaches_rank_0(pair: RankPair) -> None:
    pair.group.broadcast(b"fail")
    pair.group._readers[0].join(ANSWER_S)
    with pytest.raises(WorkerLost, match="rank 1: asked to fail"):
        pair.group.check()


def test_a_follower_ends_without_an_error_of_its_own_where_rank_0_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    def step(*_: object) -> None:
        ours.close()
        raise WorkerLost("a collective failed")

    monkeypatch.setattr(follower, "_receive", lambda *_: None)  # which ends the process, if it is the first to notice
    monkeypatch.setattr(follower, "_follow", step)
    start = StartFollower(
        engine_config="", tp_rank=1, tp_size=2, store_port=0, num_blocks=None, handler="", handler_config=b""
    )
    FrameSocket(ours).send(FrameKind.START, msgspec.msgpack.encode(start))
    with theirs:
        monkeypatch.setattr(socket, "socket", lambda fileno: theirs)
        assert follower.main(theirs.fileno()) == 1


@pytest.mark.slow
def test_followers_end_with_rank_0(model_dir: Path) -> None:
    """Rank 0 is a process of its own here, and is killed."""
    import subprocess
    import sys

    code = (
        "import sys, kvferry.tests.engine.ranks.test_group as t, pathlib\n"
        "pair = t.RankPair(pathlib.Path(sys.argv[1]))\n"
        "print(pair.group._processes[0].pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(model_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as rank_0:
        assert rank_0.stdout is not None
        follower = int(next(line for line in rank_0.stdout if line.strip().isdigit()))  # the others are its log
        ended = os.pidfd_open(follower)
        rank_0.send_signal(signal.SIGKILL)
        rank_0.wait()
        _wait_for_end(ended)


def _wait_for_end(pidfd: int) -> None:
    import select

    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(ANSWER_S * 1000), "the follower goes on without rank 0"
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, r"tensor_parallel_size = 3 does not divide the model's num_attention_heads = 4; these do: \[1, 2, 4\]"),
        (8, r"num_attention_heads = 4; these do: \[1, 2, 4\]"),
    ],
)
def test_a_size_that_does_not_divide_the_heads_is_refused(model_dir: Path, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankGroup.start(engine_config(model_dir, tensor_parallel_size=size))


def test_one_rank_needs_no_group() -> None:
    import torch

    comm = Communicator()
    x = torch.ones(2, 2)
    assert comm.all_reduce(x) is x and comm.all_gather(x) is x and comm.minimum(7, x.device) == 7
    assert comm.all_gather_rows(x) is x and comm.all_to_all(x, [2], [2]) is x


@pytest.mark.parametrize("in_rank_order", [False, True])
def test_ranks_sum_join_and_agree(in_rank_order: bool) -> None:
    import torch

    def job(comm: Communicator) -> list[object]:
        own = torch.tensor([[comm.rank, 10.0 * comm.rank], [7.0, 8.0]])
        joined, rows = comm.all_gather(own), comm.all_gather_rows(own)
        summed = comm.all_reduce(own)
        assert summed is own, "in place"
        rounded = comm.all_reduce(torch.full((40,), [1e8, 1.0, -1e8][comm.rank]))
        least = comm.minimum(5 - comm.rank, own.device)
        found = [each.tolist() for each in (joined, rows, summed)]
        return [*found, least, rounded.tolist() if in_rank_order else None]

    joined = [[0.0, 0.0, 1.0, 10.0, 2.0, 20.0], [7.0, 8.0] * 3]
    rows = [[0.0, 0.0], [7.0, 8.0], [1.0, 10.0], [7.0, 8.0], [2.0, 20.0], [7.0, 8.0]]
    # What rank 1 adds is lost where rank 0's is there before it, and rank 2's is not.
    wanted = [joined, rows, [[3.0, 30.0], [21.0, 24.0]], 3, [0.0] * 40 if in_rank_order else None]
    assert on_ranks(3, job, in_rank_order=in_rank_order) == [wanted] * 3


@pytest.mark.parametrize(
    "table", [[[0, 2, 1], [0, 0, 0], [3, 0, 2]], [[0] * 3] * 3, [[1, 0, 0], [0, 0, 40], [0, 0, 0]]]
)
def test_ranks_exchange_as_many_rows_as_they_say(table: list[list[int]]) -> None:
    import torch

    def job(comm: Communicator) -> torch.Tensor:
        own = table[comm.rank]
        rows = torch.tensor([[comm.rank, to] for to, count in enumerate(own) for _ in range(count)], dtype=torch.int64)
        rows = rows.view(-1, 2)
        return comm.all_to_all(rows, own, [sent[comm.rank] for sent in table])

    for rank, rows in enumerate(on_ranks(3, job)):
        assert rows.tolist() == [[sender, rank] for sender, sent in enumerate(table) for _ in range(sent[rank])]


def test_frames_arrive_whole_and_a_cut_one_ends_the_stream() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = FrameSocket(ours), FrameSocket(theirs)
    big = bytes(range(256)) * 4000  # more than a socket buffer holds
    writer = threading.Thread(target=sender.send, args=(FrameKind.USER, big))
    writer.start()
    assert receiver.receive() == (FrameKind.USER, big)
    writer.join()
    sender.send(FrameKind.CLOSE)
    assert receiver.receive() == (FrameKind.CLOSE, b"")
    ours.sendall(b"\x02\x10\x00\x00\x00half")
    sender.shutdown()
    assert receiver.receive() is None
    sender.close()
    receiver.close()
