"""What the predictor learns from hellos, heartbeats, transfers and requests."""

from __future__ import annotations

import pytest

from kvferry.router.state.predictor import Predictor, Way, distance
from kvferry.wire.workers import StepSample, WorkerHello

from ..fleet import hello, status, transferred

BASE_S, TOKEN_S, PAIR_S, ROW_S = 0.002, 1e-4, 1e-8, 1e-4


def prompt_step(tokens: int, context: int = 0, factor: float = 1.0) -> StepSample:
    pairs = round(tokens * (context + tokens / 2))
    return StepSample(factor * (BASE_S + TOKEN_S * tokens + PAIR_S * pairs), tokens, pairs)


def decode_step(rows: int, factor: float = 1.0) -> StepSample:
    return StepSample(factor * (BASE_S + ROW_S * rows), 0, 0, rows, rows * 100)


CALIBRATION = tuple(prompt_step(tokens, context) for tokens in (16, 32, 64) for context in (0, 500)) + tuple(
    decode_step(rows) for rows in (1, 4, 8)
)


def calibrated(worker_id: str = "p-0", **changes: object) -> WorkerHello:
    return hello(worker_id, "prefill", samples=CALIBRATION, **changes)


def known() -> Predictor:
    predictor = Predictor()
    predictor.on_hello(1, calibrated())
    return predictor


def test_a_calibrated_worker_is_known_before_its_first_request() -> None:
    predictor = known()
    budget = calibrated().max_num_batched_tokens
    steps = -(-200 // budget)
    expected_s = steps * BASE_S + 200 * TOKEN_S + 200 * 100 * PAIR_S
    assert predictor.prefill_s(1, 200, 0) == pytest.approx(expected_s, rel=0.02)
    assert predictor.prefill_s(1, 200, 5000) > predictor.prefill_s(1, 200, 0)
    assert predictor.decode_step_s(1, 8, 800) == pytest.approx(BASE_S + 8 * ROW_S, rel=0.02)


def test_nothing_is_expected_of_what_nobody_has_seen() -> None:
    predictor = Predictor()
    predictor.on_hello(1, hello("p-0", "prefill"))
    assert not predictor.is_known(1)
    assert predictor.prefill_s(1, 100, 0) == predictor.decode_step_s(1, 4, 100) == predictor.prefill_s(9, 5, 0) == 0.0
    assert predictor.chunk_tokens(9, 4, 100, 0, 1.0) == predictor.chunk_step_s(9, 4, 100, 0, 8) == 0


def test_prompts_are_expected_to_take_what_they_take_where_that_is_known() -> None:
    predictor = Predictor()
    predictor.on_hello(1, hello("d-0", "decode", tp_size=2))
    assert predictor.unloaded_s(100) == 0.0
    predictor.on_hello(2, calibrated())
    assert predictor.unloaded_s(100) == predictor.prefill_s(2, 100, 0) > 0


def test_workers_of_one_kind_learn_from_each_other() -> None:
    predictor = known()
    predictor.on_hello(2, hello("p-1", "prefill"))
    assert predictor.prefill_s(2, 64, 0) == predictor.prefill_s(1, 64, 0) > 0


def test_a_slow_worker_is_told_from_its_kind() -> None:
    predictor = known()
    predictor.on_hello(2, calibrated("p-1"))
    for step in range(200):
        predictor.on_status(1, status(steps=10 + step, samples=(prompt_step(64),)))
        predictor.on_status(2, status(steps=10 + step, samples=(prompt_step(64, factor=2.0),)))
    assert predictor.prefill_s(2, 64, 0) > 1.6 * predictor.prefill_s(1, 64, 0)


def test_first_steps_of_a_worker_without_calibration_are_cold() -> None:
    predictor = Predictor()
    predictor.on_hello(1, hello("p-0", "prefill"))
    predictor.on_status(1, status(steps=2, samples=(prompt_step(64, factor=50.0),)))
    assert not predictor.is_known(1)
    predictor.on_status(1, status(steps=20, samples=(prompt_step(64),)))
    assert predictor.is_known(1)


def test_a_chunk_fills_what_the_rows_leave_of_a_step() -> None:
    predictor = known()
    alone = predictor.chunk_tokens(1, 0, 0, 0, BASE_S + 32 * TOKEN_S)
    assert alone == pytest.approx(32, abs=2)
    assert predictor.chunk_tokens(1, 0, 0, 0, BASE_S / 2) == 0
    assert predictor.chunk_tokens(1, 0, 0, 0, 1e9) == calibrated().max_num_batched_tokens
    step_s = predictor.chunk_step_s(1, 0, 0, 100, 24)
    assert predictor.chunk_tokens(1, 0, 0, 100, step_s + TOKEN_S / 2) == 24
    assert step_s == pytest.approx(BASE_S + 24 * (TOKEN_S + 100 * PAIR_S), rel=0.05)


def test_streams_take_no_more_of_a_step_with_a_chunk_than_alone() -> None:
    predictor = Predictor()
    slow = tuple(StepSample(0.5 + TOKEN_S * tokens, tokens, 0) for tokens in (16, 32, 64))  # whatever made them so
    predictor.on_hello(1, hello("d-0", "decode", samples=slow + tuple(decode_step(rows) for rows in (1, 4, 8))))
    assert predictor.chunk_tokens(1, 4, 400, 0, BASE_S + 4 * ROW_S + 32 * TOKEN_S) == pytest.approx(32, rel=0.1)


def test_transfers_are_learned_by_path() -> None:
    predictor = Predictor()
    report = transferred(transfer_s=0.5, exposed_s=0.5)
    assert predictor.transfer_s("host", 10**9) == 0.0
    predictor.on_transfer(report, "host", 1)
    assert predictor.transfer_s("host", 10**9) == pytest.approx(0.5)
    assert predictor.exposed_s("host", 10**9, prefill_s=2.0) == pytest.approx(0.5)  # never less than was seen
    assert predictor.exposed_s("host", 4 * 10**9, prefill_s=1.0) == pytest.approx(1.0)
    assert predictor.transfer_s("rack", 10**9) == 0.0


def test_what_predictions_miss_by_is_added_to_the_next() -> None:
    predictor = known()
    for _ in range(50):
        predictor.on_first_token(Way.LOCAL, predictor.first_token_s(Way.LOCAL, 0.1), 0.13, bare_s=0.1)
    assert predictor.first_token_s(Way.LOCAL, 0.1, 2.0) == pytest.approx(2.13, rel=0.05)
    assert predictor.biases[Way.LOCAL].seconds == pytest.approx(0.03, rel=0.05)
    assert predictor.biases[Way.HANDOFF].seconds == 0.0


def test_predictions_stay_above_nothing_and_go_on_learning_after_a_calibration_under_load() -> None:
    """Steps were measured four times too long, on a machine that is idle now."""
    predictor = Predictor()
    busy = tuple(prompt_step(tokens, factor=4.0) for tokens in (16, 32, 64))
    predictor.on_hello(1, hello("d-0", "decode", samples=busy))
    for _ in range(20):  # long prompts come much sooner than predicted
        _meet(predictor, 400)
    assert predictor.biases[Way.LOCAL].seconds < 0
    bare_s = predictor.prefill_s(1, 16, 0)
    assert predictor.biases[Way.LOCAL].seconds < -bare_s  # a short prompt takes less than what it would be less
    assert predictor.first_token_s(Way.LOCAL, bare_s) == pytest.approx(bare_s / 4)
    assert predictor.unloaded_s(16) > 0
    for _ in range(100):  # and short ones teach how much that was too much
        _meet(predictor, 16)
    assert predictor.first_token_s(Way.LOCAL, bare_s) == pytest.approx(bare_s / 4, rel=0.05)
    assert predictor.biases[Way.LOCAL].seconds == pytest.approx(-0.75 * bare_s, rel=0.05)


def _meet(predictor: Predictor, num_tokens: int) -> None:
    """A prompt that takes a quarter of what its steps are thought to take."""
    bare_s = predictor.prefill_s(1, num_tokens, 0)
    predicted_s = predictor.first_token_s(Way.LOCAL, bare_s)
    assert predicted_s > 0
    predictor.on_first_token(Way.LOCAL, predicted_s, bare_s / 4, bare_s=bare_s)


@pytest.mark.parametrize("wait_s", [0.0, 3.0])
def test_a_first_token_that_waited_for_others_teaches_nothing_of_its_own(wait_s: float) -> None:
    predictor = known()
    predictor.on_first_token(Way.HANDOFF, 0.1 + wait_s, 0.14 + wait_s, bare_s=0.1, wait_s=wait_s)
    assert (predictor.biases[Way.HANDOFF].num_seen > 0) == (wait_s == 0)
    assert len(predictor.ttft_errors) == 1


def test_answers_are_expected_to_be_as_long_as_they_were() -> None:
    predictor = Predictor()
    assert predictor.expected_output(10_000) == 256
    for _ in range(200):
        predictor.on_finished(40)
    assert predictor.expected_output(10_000) == 40 and predictor.expected_output(8) == 8


def test_the_narrowest_shared_place_is_the_distance() -> None:
    def at(*labels: tuple[str, str]) -> WorkerHello:
        return hello("w", "decode", labels=labels)

    a = at(("zone", "z1"), ("rack", "r1"), ("host", "h1"))
    assert distance(a, a) == "host"
    assert distance(a, at(("zone", "z1"), ("rack", "r1"), ("host", "h2"))) == "rack"
    assert distance(a, at(("zone", "z1"), ("rack", "r9"), ("host", "h1"))) == "zone"
    assert distance(a, at(("zone", "z2"))) == distance(a, at()) == "apart"
