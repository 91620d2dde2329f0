"""Reservations, adoption, local prompts and aborts, as the router sees them."""

from __future__ import annotations

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.blocks import BlockPool, KVCacheSpec
from kvferry.common.clock import FakeClock
from kvferry.common.config import TransferConfig
from kvferry.common.messages import (
    Abort,
    ChoiceTokens,
    Grant,
    HandoffDone,
    KVArrived,
    KVOpen,
    LocalTask,
    Message,
    NoCapacity,
    RegionInfo,
    ReserveKV,
    StepTokens,
    TaskRefused,
)
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.decode.role import DecodeRole
from kvferry.transfer.receiver import KVReceiver

BLOCK, EOS = 4, 2
SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")
REGION = RegionInfo(
    rank=0,
    tp_size=1,
    agent="d.1.0.0",
    generation=0,
    agent_metadata=b"",
    base_addr=0,
    num_blocks=64,
    page_bytes=SPEC.page_bytes(),
    device="DRAM",
    device_id=0,
    transport="local",
)


class _Bench:
    """A decode role with a real receiver; the prefill worker's part is played by hand."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.sent: list[Message] = []
        self.pool = BlockPool(num_blocks, BLOCK)
        self.receiver = KVReceiver(
            worker_id="d",
            incarnation=1,
            spec=SPEC,
            tp_size=1,
            pool=self.pool,
            regions=(REGION,),
            kv_address="127.0.0.1:1",
            config=TransferConfig(),
            clock=FakeClock(),
            version="0",
            transport="local",
            to_router=lambda router, message: self.sent.append(message),
            to_peer=lambda session, message: None,
        )
        self.role = DecodeRole(
            pool=self.pool,
            spec=SPEC,
            receiver=self.receiver,
            to_router=lambda router, message: self.sent.append(message),
            eos_token_ids=frozenset({EOS}),
            max_model_len=1000,
            max_num_batched_tokens=16,
            max_num_seqs=8,
        )

    def spec(
        self, name: str, num_tokens: int, n: int = 1, outputs: tuple[list[int], ...] = (), **more: object
    ) -> RequestSpec:
        sampling = SamplingParams(temperature=0.0, max_tokens=4)
        return RequestSpec(
            request_id=name,
            attempt=0,
            prompt=pack_ids(list(range(100, 100 + num_tokens))),
            sampling=sampling,
            choices=tuple(range(n)),
            outputs=tuple(pack_ids(tokens) for tokens in outputs),
            **more,  # type: ignore[arg-type]  # fields by name
        )

    def send(self, message: Message) -> None:
        self.role.on_router_message("R", message)

    def last(self, kind: type[Message]) -> Message:
        return next(message for message in reversed(self.sent) if isinstance(message, kind))

    def hand_over(self, spec: RequestSpec, first_tokens: tuple[ChoiceTokens, ...]) -> None:
        """Reserve, open and arrive, as a prefill worker would."""
        self.send(ReserveKV(spec=spec))
        grant = self.last(Grant)
        assert isinstance(grant, Grant)
        self.receiver.on_message(
            "p#1",
            KVOpen(
                grant_id=grant.grant.grant_id,
                open_id=7,
                mac=grant.grant.mac,
                worker_id="p",
                incarnation=5,
                spec=SPEC,
                version="0",
                transport="local",
                tp_size=1,
            ),
        )
        self.receiver.on_arrived(
            0,
            KVArrived(
                grant_id=grant.grant.grant_id,
                open_id=7,
                source_rank=0,
                num_tokens=spec.num_prompt_tokens,
                first_tokens=first_tokens,
            ),
        )

    def step(self, token: int = 9) -> Batch | None:
        batch = self.role.schedule()
        if batch is not None:
            rows = [
                RowOutput(tuple(SampledToken(token) for _ in row.choices) if row.samples else ()) for row in batch.rows
            ]
            self.role.complete(batch, StepOutput(rows, 0.01, batch.num_tokens))
        return batch

    def run(self, token: int = 9) -> None:
        for _ in range(50):
            if self.step(token) is None:
                return
        raise AssertionError("it never ends")

    def tokens(self, name: str) -> dict[int, list[tuple[int, int]]]:
        """(index, token) pairs that the router got, by choice."""
        got: dict[int, list[tuple[int, int]]] = {}
        for message in self.sent:
            if isinstance(message, StepTokens):
                for update in message.updates:
                    for choice in update.choices if update.request_id == name else ():
                        pairs = enumerate(choice.tokens, choice.first_index)
                        got.setdefault(choice.choice, []).extend((index, token.token_id) for index, token in pairs)
        return got


def _first(choice: int, token: int, finish: str | None = None) -> ChoiceTokens:
    return ChoiceTokens(choice, 0, (SampledToken(token),), finish)


def test_an_arrived_prompt_decodes_from_the_first_token_which_is_repeated() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 6), (_first(0, 5),))
    assert isinstance(bench.last(HandoffDone), HandoffDone)
    bench.run()
    assert bench.tokens("a") == {0: [(0, 5), (1, 9), (2, 9), (3, 9)]}
    assert bench.pool.num_owned_blocks == 0 and bench.role.num_unfinished == 0


def test_choices_share_the_prompt_and_each_has_its_own_copy_of_the_partial_block() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 6, n=3), tuple(_first(choice, 5 + choice) for choice in range(3)))
    batch = bench.role.schedule()
    assert batch is not None and len(batch.block_copies) == 2
    tables = [row.seq.block_table for row in batch.rows]
    assert len({table[0] for table in tables}) == 1 and len({table[1] for table in tables}) == 3
    rows = [RowOutput((SampledToken(9),)) for _ in batch.rows]
    bench.role.complete(batch, StepOutput(rows, 0.01, 3))
    bench.run()
    assert [pairs[0] for pairs in bench.tokens("a").values()] == [(0, 5), (0, 6), (0, 7)]
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_a_choice_that_ended_with_its_first_token_takes_no_row() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (_first(0, EOS, "stop"), _first(1, 5)))
    batch = bench.step()
    assert batch is not None and [row.seq.choice for row in batch.rows] == [1]
    bench.run()
    assert bench.tokens("a")[0] == [(0, EOS)] and bench.pool.num_owned_blocks == 0


def test_a_local_prompt_is_computed_here_and_forked_for_its_choices() -> None:
    bench = _Bench()
    bench.send(LocalTask(spec=bench.spec("a", 20, n=2)))
    bench.run()
    expected = [(0, 9), (1, 9), (2, 9), (3, 9)]
    assert bench.tokens("a") == {0: expected, 1: expected}
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_an_end_token_ends_a_choice() -> None:
    bench = _Bench()
    bench.send(LocalTask(spec=bench.spec("a", 5)))
    bench.run(token=EOS)
    message = bench.last(StepTokens)
    assert isinstance(message, StepTokens)
    assert message.updates[0].choices[0].finish == "stop" and bench.tokens("a") == {0: [(0, EOS)]}


def test_a_resume_goes_on_after_the_accepted_tokens() -> None:
    bench = _Bench()
    bench.send(LocalTask(spec=bench.spec("a", 6, n=2, outputs=([5, 6], [7]))))
    bench.run()
    assert bench.tokens("a") == {0: [(2, 9), (3, 9)], 1: [(1, 9), (2, 9), (3, 9)]}


def test_a_resume_over_a_handoff_feeds_the_accepted_tokens_again() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 8, n=2, outputs=([5, 6], [])), ())
    bench.run()
    assert bench.tokens("a") == {0: [(2, 9), (3, 9)], 1: [(0, 9), (1, 9), (2, 9), (3, 9)]}
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_a_prompt_that_is_held_already_is_not_worth_a_handoff() -> None:
    bench = _Bench()
    bench.send(LocalTask(spec=bench.spec("a", 8)))
    bench.run()
    bench.send(ReserveKV(spec=bench.spec("b", 8)))
    answer = bench.last(NoCapacity)
    assert isinstance(answer, NoCapacity) and (answer.reason, answer.num_cached_tokens) == ("held", 8)


def test_an_abort_frees_everything_at_any_stage() -> None:
    def granted(bench: _Bench) -> None:
        bench.send(ReserveKV(spec=bench.spec("a", 6)))

    def arrived(bench: _Bench) -> None:
        bench.hand_over(bench.spec("a", 6), (_first(0, 5),))

    def running(bench: _Bench) -> None:
        arrived(bench)
        bench.step()

    def waiting(bench: _Bench) -> None:
        bench.send(LocalTask(spec=bench.spec("a", 40)))

    def computing(bench: _Bench) -> None:
        waiting(bench)
        bench.step()

    for stage in (granted, arrived, running, waiting, computing):
        bench = _Bench()
        stage(bench)
        bench.send(Abort(request_id="a", attempt=0))
        bench.run()
        assert bench.pool.num_owned_blocks == 0, stage.__name__
        assert bench.role.num_unfinished == 0 and bench.receiver.num_live == 0
        bench.pool.check()


def test_an_abort_of_one_choice_leaves_the_others() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (_first(0, 5), _first(1, 6)))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, choices=(0,)))
    bench.run()
    assert len(bench.tokens("a")[0]) < 4 and len(bench.tokens("a")[1]) == 4
    assert bench.pool.num_owned_blocks == 0


def test_a_choice_that_is_aborted_before_its_prompt_is_here_never_decodes() -> None:
    bench = _Bench()
    bench.send(LocalTask(spec=bench.spec("a", 20, n=2)))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, choices=(0,)))
    bench.run()
    assert set(bench.tokens("a")) == {1} and bench.pool.num_owned_blocks == 0
    handed = _Bench()
    spec = handed.spec("b", 6, n=2)
    handed.send(ReserveKV(spec=spec))
    handed.send(Abort(request_id="b", attempt=0, choices=(0,)))
    handed.hand_over(spec, (_first(0, 5), _first(1, 6)))
    handed.run()
    assert len(handed.tokens("b").get(0, [])) <= 1 and len(handed.tokens("b")[1]) == 4
    assert handed.pool.num_owned_blocks == 0


def test_unless_arrived_keeps_a_request_that_has_arrived() -> None:
    bench = _Bench()
    bench.hand_over(bench.spec("a", 6), (_first(0, 5),))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, unless_arrived=True))
    bench.run()
    assert len(bench.tokens("a")[0]) == 4


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    bench = _Bench(num_blocks=2)
    bench.send(LocalTask(spec=bench.spec("a", 18)))
    refused = bench.last(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "never_fits" and "pool has 2" in refused.detail


def test_a_draining_worker_takes_nothing_new() -> None:
    bench = _Bench()
    bench.role.draining = True
    bench.send(LocalTask(spec=bench.spec("a", 4)))
    bench.send(ReserveKV(spec=bench.spec("b", 4)))
    refused, full = bench.last(TaskRefused), bench.last(NoCapacity)
    assert isinstance(refused, TaskRefused) and isinstance(full, NoCapacity)
    assert refused.reason == full.reason == "draining"
