import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from kvferry.benchmarks.shared import step_tap
from kvferry.benchmarks.shared.step_tap import HelloLine, StepsLine, TappedPredictor, TransferLine, read_tap
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.router_config import RouterConfig
from kvferry.router import assembly, placement
from kvferry.router.access.keys import ApiKeys
from kvferry.router.placement.policy import RoutingPolicy
from kvferry.router.state.predictor import Predictor
from kvferry.tools.load.tiny_model import write_tiny_model
from kvferry.wire.workers import StepSample, TransferReport, WorkerHello, WorkerStatus

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
SAMPLE = StepSample(0.01, 16, 128)


def _hello() -> WorkerHello:
    return WorkerHello(
        worker_id="d-0",
        role="decode",
        incarnation=1,
        version="1",
        model="m",
        spec=SPEC,
        tp_size=1,
        num_blocks=10,
        max_model_len=100,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_address="",
        pid=1,
        transport="nixl",
        samples=(SAMPLE,),
    )


def _status(*samples: StepSample) -> WorkerStatus:
    return WorkerStatus(
        seq=1,
        state="ready",
        num_running=0,
        num_waiting=0,
        waiting_tokens=0,
        num_free_blocks=1,
        num_cached_blocks=0,
        num_granted_blocks=0,
        num_quarantined_blocks=0,
        num_blocks=10,
        steps=20,
        busy_for_s=0.0,
        samples=samples,
    )


def test_what_the_router_hears_of_steps_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "tap"
    with path.open("a") as file:
        predictor = TappedPredictor(file)
        predictor.on_hello(3, _hello())
        predictor.on_status(3, _status())
        predictor.on_status(3, _status(SAMPLE, SAMPLE))
        report = TransferReport(
            request_id="r",
            attempt=0,
            decode_worker="d-0",
            num_bytes=100,
            num_blocks=1,
            transfer_s=0.1,
            exposed_s=0.001,
            clean=True,
        )
        predictor.on_transfer(report, "host", 2)
        predictor.on_transfer(msgspec.structs.replace(report, clean=False), "host", 2)
    tap = read_tap(path)
    assert tap.calibration == [SAMPLE] and tap.samples == [SAMPLE, SAMPLE]
    assert tap.hellos[0].spec == SPEC and tap.steps[0].worker == "d-0"
    assert [line.exposed_s for line in tap.transfers] == [0.001]
    assert predictor.is_known(3)


def test_the_router_that_is_started_writes_down_what_it_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir, path = write_tiny_model(tmp_path / "model"), tmp_path / "tap"

    def make_policy(config: RouterConfig, predictor: Predictor) -> RoutingPolicy:
        predictor.on_hello(3, _hello())
        return placement.make_policy(config, predictor)

    def router() -> int:
        assert sys.argv[1:] == ["--flag"]
        asyncio.run(assembly.assemble(RouterConfig(model_dir=model_dir, served_model_name="m"), ApiKeys(), None))
        return 7

    monkeypatch.setattr(assembly, "Predictor", Predictor)  # as before, afterwards
    monkeypatch.setattr(assembly, "make_policy", make_policy)
    monkeypatch.setattr("kvferry.router.process.main", router)
    monkeypatch.setattr(sys, "argv", ["step_tap", "router", str(path), "--flag"])
    assert step_tap.main() == 7
    assert [hello.worker for hello in read_tap(path).hellos] == ["d-0"]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tap"
    path.write_text('{"type":"steps","at_s":1.0,"worker":"d-0","samples":[]}\n{"type":"ste')
    assert len(read_tap(path).steps) == 1


def test_a_stretch_of_time_keeps_every_hello() -> None:
    from kvferry.benchmarks.shared.step_tap import Tap

    hello = HelloLine(0.0, "d-0", "decode", SPEC, 10, 4, 64, ())
    steps = tuple(StepsLine(at_s, "d-0", (SAMPLE,)) for at_s in (1.0, 2.0, 3.0))
    cut = Tap((hello,), steps, (TransferLine(3.5, 1, 1.0, 0.1),)).between(2.0, 3.0)
    assert cut.hellos == (hello,) and cut.steps == steps[1:2] and not cut.transfers
