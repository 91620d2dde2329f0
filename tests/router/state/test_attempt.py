"""An attempt ends by being dropped; what a request has learned about workers outlives it."""

from __future__ import annotations

import pytest

from kvferry.common.request import SamplingParams
from kvferry.router.state.attempt import Attempt, AttemptState
from kvferry.router.state.failures import CLEARED_BY_STEPS, WORKER_LOST, Blame, Suspicion
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.pools import Pools
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.search import QUEUE_IF_FULL_AFTER_S, max_num_tokens
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.tracked_request import TrackedRequest
from kvferry.router.state.views import RequestLoad
from kvferry.router.state.worker import RouterWorker
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.results import FirstToken, HandoffFailed, TaskRefused
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV
from kvferry.wire.workers import CacheChange

from ..fleet import Fleet, Link, hello, status

NUM_TOKENS = 40


class Scene:
    """A request, its prefill worker and its decode worker."""

    def __init__(self) -> None:
        self.pools = Pools()
        self.prefill, self.decode, self.other = (self._join(name, n) for n, name in enumerate(("p-0", "d-0", "p-1"), 1))
        self.request = RouterRequest("r-0", list(range(1, NUM_TOKENS + 1)), SamplingParams(max_tokens=8))
        stream = TokenStream(self.request, lambda: None, lambda choice: None)
        self.tracked = TrackedRequest(self.request, stream, None)

    def _join(self, name: str, number: int) -> RouterWorker:
        worker = self.pools.join(Link(name, number), hello(name, "prefill" if name[0] == "p" else "decode"), 0.0)
        worker.on_status(status(), 0.0)
        return worker

    def begin(self, **changes: object) -> Attempt:
        attempt = Attempt(self.request, self.decode, None, 1.0, **changes)  # type: ignore[arg-type]
        self.tracked.begin(attempt)
        return attempt

    def reserve(self, **changes: object) -> Attempt:
        attempt = self.begin(**changes)
        attempt.reserve(self.prefill, max_local_tokens=0, queue_if_full=False)
        return attempt

    def sent(self, worker: RouterWorker) -> list[type]:
        assert isinstance(worker.link, Link)
        return [type(message) for message in worker.link.sent]


def test_a_state_implies_those_before_it_and_never_goes_back() -> None:
    attempt = Scene().begin()
    for state in (AttemptState.COMPUTED, AttemptState.BEGUN, AttemptState.ARRIVED, AttemptState.COMPUTED):
        attempt.note(state)
    assert attempt.state is AttemptState.ARRIVED


def test_a_decode_worker_has_the_paces_of_its_streams_until_they_leave() -> None:
    scene = Scene()
    scene.request.priority, scene.request.objectives = 3, Objectives(tpot_s=0.04)
    attempt = scene.reserve()
    other = RequestLoad(0, 1, 1, pace=(3, 0.04))
    scene.decode.bind("other", other)
    assert scene.decode.view(1.0).paces == ((3, 0.04),) and not scene.prefill.view(1.0).paces
    attempt.leave()
    assert scene.decode.view(1.0).paces == ((3, 0.04),)
    scene.decode.release("other")
    scene.decode.release("other")
    assert scene.decode.view(1.0).paces == ()


def test_an_ended_attempt_has_nothing_on_its_workers() -> None:
    scene = Scene()
    scene.reserve()
    assert scene.prefill.loads.keys() == scene.decode.loads.keys() == {"r-0"}
    scene.tracked.end_attempt()
    scene.tracked.end_attempt()  # there is none any more
    assert scene.tracked.attempt is None and not scene.prefill.loads and not scene.decode.loads
    assert scene.sent(scene.decode) == [ReserveKV, Abort] and scene.sent(scene.prefill) == [Abort]


def test_a_prefill_worker_hears_nothing_of_an_end_after_the_arrival() -> None:
    scene = Scene()
    attempt = scene.begin()
    attempt.run_locally(1.0)
    attempt.arrive(2.0)
    scene.tracked.end_attempt()
    assert scene.sent(scene.decode) == [LocalTask, Abort] and not scene.sent(scene.prefill)
    handed = Scene()
    attempt = handed.reserve()
    handed.request.advance(RequestStatus.PREFILLING, 1.0)
    attempt.arrive(2.0)
    handed.tracked.end_attempt()
    assert Abort not in handed.sent(handed.prefill) and Abort in handed.sent(handed.decode)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (AttemptState.ASKED, None),
        (AttemptState.BEGUN, (1, False)),
        (AttemptState.COMPUTED, (1, True)),
        (AttemptState.ARRIVED, (1, True)),
        (AttemptState.STEPPED, (1, True)),
    ],
)
def test_a_failed_attempt_tells_what_its_prefill_worker_has(
    state: AttemptState, expected: tuple[int, bool] | None
) -> None:
    attempt = Scene().reserve()
    attempt.note(state)
    assert attempt.prompt_cache() == expected
    attempt.lost_prefill = Blame(WORKER_LOST, "p-0")
    assert attempt.prompt_cache() is None


def test_a_worker_whose_task_goes_to_another_one_is_free_of_it() -> None:
    scene = Scene()
    attempt = scene.reserve()
    grant = GrantInfo(
        grant_id=GrantId("d-0", 1, 1),
        spec=scene.decode.hello.spec,
        kv_address="127.0.0.1:1",
        block_ids=(0,),
        num_tokens=NUM_TOKENS,
        num_computed_tokens=0,
        ranks=(),
        open_within_s=2.0,
        mac=b"",
    )
    attempt.take_grant(grant, 1.0)
    attempt.send_task(1.0, scene.other)
    assert attempt.prefill is scene.other and scene.other.loads.keys() == {"r-0"}
    assert not scene.prefill.loads


def test_each_choice_but_the_first_has_a_block_of_its_own() -> None:
    scene = Scene()
    request = RouterRequest("r-1", list(range(NUM_TOKENS)), SamplingParams(max_tokens=8), n=3)
    Attempt(request, scene.decode, None, 1.0).run_locally(1.0)
    assert scene.decode.loads["r-1"].num_blocks == scene.decode.hello.spec.num_blocks_for(NUM_TOKENS) + 2


def test_messages_count_from_those_and_then_when_they_may_come() -> None:
    scene = Scene()
    attempt = scene.reserve()
    first = FirstToken(request_id="r-0", attempt=0, choices=(), num_cached_tokens=0, prefill_s=0.0, queue_s=0.0)
    failed = HandoffFailed(request_id="r-0", attempt=0, reason="its session ended", blame="peer")
    full, unserved = (TaskRefused(request_id="r-0", attempt=0, reason=reason) for reason in ("blocks", "adapter"))
    assert not attempt.expects(scene.prefill, first) and not attempt.expects(scene.decode, failed)
    scene.request.advance(RequestStatus.PREFILLING, 1.0)
    assert attempt.expects(scene.prefill, first) and not attempt.expects(scene.decode, first)
    assert attempt.expects(scene.decode, failed) and not attempt.expects(scene.prefill, failed)
    scene.request.advance(RequestStatus.DECODING, 2.0)
    assert attempt.expects(scene.decode, unserved) and not attempt.expects(scene.prefill, unserved)
    assert not attempt.expects(scene.decode, full)
    alone = Scene()
    local = alone.begin()
    local.run_locally(1.0)
    assert not local.expects(alone.decode, failed)


def test_a_prompt_that_a_worker_has_is_no_load_there() -> None:
    scene = Scene()
    scene.reserve(whole_prompt_on=1)
    assert scene.prefill.loads["r-0"].num_tokens == scene.prefill.hello.spec.block_size
    elsewhere = Scene()
    elsewhere.reserve(whole_prompt_on=3)
    assert elsewhere.prefill.loads["r-0"].num_tokens == NUM_TOKENS


def test_a_search_ends_with_the_task_and_knows_on_what_it_has_learned() -> None:
    scene = Scene()
    search = scene.tracked.search
    search.waits_s = 0.0
    search.note_refusal(scene.other, 5.0, 1.0)
    scene.reserve()
    scene.tracked.end_attempt(tell=False)  # nothing was reserved: the same search goes on
    assert search.queue_if_full(QUEUE_IF_FULL_AFTER_S)
    scene.request.advance(RequestStatus.QUEUED, 1.0)
    scene.begin()
    scene.tracked.run_locally(1.5)
    assert not search.queue_if_full(100.0) and search.is_refused_by(scene.other, 2.0)


def test_what_a_request_was_suspected_of_is_over_when_its_next_attempt_has_gone_on_for_a_while() -> None:
    scene = Scene()
    attempt = scene.begin()
    scene.tracked.suspicion = Suspicion(scene.other.life, 0.5)
    suspicions = []
    for _ in range(CLEARED_BY_STEPS):
        suspicions.append(scene.tracked.suspicion)
        scene.tracked.note_step(attempt)
    assert None not in suspicions and scene.tracked.suspicion is None


def test_a_request_that_was_put_aside_is_looked_at_again_where_there_is_hope() -> None:
    scene = Scene()
    scene.tracked.search.is_aside = True
    assert scene.tracked.is_put_off(1.0)
    scene.tracked.search.note_hope()
    assert not scene.tracked.is_put_off(1.0)


def test_no_answer_is_longer_than_the_shortest_context_allows() -> None:
    scene = Scene()
    most = scene.pools.least_model_len
    assert most is not None and max_num_tokens(scene.request, scene.pools) == NUM_TOKENS + 8 < most
    long = RouterRequest("r-1", list(range(NUM_TOKENS)), SamplingParams(max_tokens=most))
    assert max_num_tokens(long, scene.pools) == most


def test_what_is_cached_is_no_help_to_who_wants_log_probabilities_of_it() -> None:
    scene = Scene()
    scene.pools.prefix_index.on_change(1, CacheChange(0, stored=bytes(range(16))))
    scene.request.block_hashes = [bytes(range(16))]
    search = scene.tracked.search
    assert search.demand(scene.pools, frozenset(), 1.0).cached == {1: scene.pools.block_size}
    scene.request.sampling = SamplingParams(max_tokens=8, prompt_logprobs=1)
    assert search.demand(scene.pools, frozenset(), 1.0).cached == {}


def test_a_pair_is_late_again_only_the_second_time() -> None:
    search = Scene().tracked.search
    assert not search.note_late((1, 2)) and not search.note_late((1, 3)) and search.note_late((1, 2))


def test_a_retry_begins_with_a_new_attempt() -> None:
    fleet = Fleet()
    prefill, decode = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(prefill, decode)
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None and tracked.attempt is not None
    first = tracked.attempt
    fleet.failed(decode, task)
    again = tracked.attempt
    assert again is not None and again is not first and stream.request.attempt_number == 1
    assert (again.prefill, again.grant, again.state) == (None, None, AttemptState.SENT)  # the pair has failed
    assert list(tracked.search.failed_pairs) == [first.pair_sessions]
