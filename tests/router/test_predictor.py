"""What the predictor learns from hellos, heartbeats, transfers and requests."""

from __future__ import annotations

import pytest

from kvferry.common.messages import StepSample, TransferReport, WorkerHello
from kvferry.router.predictor import Predictor, Way, distance
from kvferry.tests.router.fleet import hello, status

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


def test_streams_take_no_more_of_a_step_with_a_chunk_than_alone() -> None:
    predictor = Predictor()
    slow = tuple(StepSample(0.5 + TOKEN_S * tokens, tokens, 0) for tokens in (16, 32, 64))  # whatever made them so
    predictor.on_hello(1, hello("d-0", "decode", samples=slow + tuple(decode_step(rows) for rows in (1, 4, 8))))
    assert predictor.chunk_tokens(1, 4, 400, 0, BASE_S + 4 * ROW_S + 32 * TOKEN_S) == pytest.approx(32, rel=0.1)


def test_transfers_are_learned_by_path() -> None:
    predictor = Predictor()
    report = TransferReport(
        request_id="r",
        attempt=0,
        decode_worker="d-0",
        num_bytes=10**9,
        num_blocks=1,
        transfer_s=0.5,
        exposed_s=0.5,
        clean=True,
    )
    assert predictor.transfer_s("host", 10**9) == 0.0
    predictor.on_transfer(report, "host", 1)
    assert predictor.transfer_s("host", 10**9) == pytest.approx(0.5)
    assert predictor.exposed_s("host", 10**9, prefill_s=2.0) == pytest.approx(0.5)  # never less than was seen
    assert predictor.exposed_s("host", 4 * 10**9, prefill_s=1.0) == pytest.approx(1.0)
    assert predictor.transfer_s("rack", 10**9) == 0.0


def test_what_predictions_miss_by_is_added_to_the_next() -> None:
    predictor = known()
    for _ in range(50):
        predicted_s = 0.1 + predictor.biases[Way.LOCAL].seconds
        predictor.on_first_token(Way.LOCAL, predicted_s, 0.13)
    assert predictor.biases[Way.LOCAL].seconds == pytest.approx(0.03, rel=0.05)
    assert predictor.biases[Way.HANDOFF].seconds == 0.0


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
