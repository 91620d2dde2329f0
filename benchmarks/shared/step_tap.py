"""`kvferry serve` whose router writes down what its workers say of their steps: a simulator is fed with that.

python -m kvferry.benchmarks.shared.step_tap serve FILE MODEL ...     a launcher whose router is started as below
python -m kvferry.benchmarks.shared.step_tap router FILE ...          a router that appends to FILE

A line of JSON for each hello (with the worker's self-calibration), each heartbeat that has samples, and each transfer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TextIO

import msgspec

from kvferry import cli
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.launch.local import LocalLauncher
from kvferry.router import assembly
from kvferry.router import process as router_program
from kvferry.router.state.predictor import Predictor
from kvferry.wire.workers import StepSample, TransferReport, WorkerHello, WorkerStatus

_MODULE = "kvferry.benchmarks.shared.step_tap"


class HelloLine(msgspec.Struct, tag="hello", frozen=True):
    at_s: float
    worker: str
    role: str
    spec: KVCacheSpec
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    samples: tuple[StepSample, ...]


class StepsLine(msgspec.Struct, tag="steps", frozen=True):
    at_s: float  # perf_counter of this machine, the same in every process
    worker: str
    samples: tuple[StepSample, ...]


class TransferLine(msgspec.Struct, tag="transfer", frozen=True):
    at_s: float
    num_bytes: int
    transfer_s: float
    exposed_s: float


Line = HelloLine | StepsLine | TransferLine
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Line).decode


class TappedPredictor(Predictor):
    """The router's own, and a file."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self._file = file
        self._names: dict[int, str] = {}

    def on_hello(self, session: int, hello: WorkerHello) -> None:
        super().on_hello(session, hello)
        self._names[session] = hello.worker_id
        self._write(
            HelloLine(
                perf_counter(),
                hello.worker_id,
                hello.role,
                hello.spec,
                hello.num_blocks,
                hello.max_num_seqs,
                hello.max_num_batched_tokens,
                hello.samples,
            )
        )

    def on_status(self, session: int, status: WorkerStatus) -> None:
        super().on_status(session, status)
        if status.samples:
            self._write(StepsLine(perf_counter(), self._names.get(session, ""), status.samples))

    def on_transfer(self, report: TransferReport, path: str, num_layers: int) -> None:
        super().on_transfer(report, path, num_layers)
        if report.clean:
            self._write(TransferLine(perf_counter(), report.num_bytes, report.transfer_s, report.exposed_s))

    def _write(self, line: Line) -> None:
        self._file.write(_encode(line).decode() + "\n")
        self._file.flush()


@dataclass(slots=True, frozen=True)
class Tap:
    """What a run has written down."""

    hellos: tuple[HelloLine, ...]
    steps: tuple[StepsLine, ...]
    transfers: tuple[TransferLine, ...]

    def between(self, begin_s: float, end_s: float) -> Tap:
        """The steps and transfers of that time, and every hello."""
        return Tap(
            self.hellos,
            tuple(line for line in self.steps if begin_s <= line.at_s < end_s),
            tuple(line for line in self.transfers if begin_s <= line.at_s < end_s),
        )

    @property
    def calibration(self) -> list[StepSample]:
        return [sample for line in self.hellos for sample in line.samples]

    @property
    def samples(self) -> list[StepSample]:
        return [sample for line in self.steps for sample in line.samples]


def tapped_serve(path: Path) -> tuple[str, ...]:
    """Instead of `kvferry serve`, as `serving` of `tools/chaos/serve_system.py` takes it."""
    return (sys.executable, "-m", _MODULE, "serve", str(path))


def read_tap(path: Path) -> Tap:
    lines: Sequence[Line] = [_decode(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    return Tap(
        tuple(line for line in lines if isinstance(line, HelloLine)),
        tuple(line for line in lines if isinstance(line, StepsLine)),
        tuple(line for line in lines if isinstance(line, TransferLine)),
    )


def main() -> int:
    role, path, *arguments = sys.argv[1:]
    if role == "serve":
        defaults = LocalLauncher.__init__.__kwdefaults__
        assert defaults is not None and "router_program" in defaults
        defaults["router_program"] = (sys.executable, "-m", _MODULE, "router", path)
        cli.main(["serve", *arguments])
    assert hasattr(assembly, "Predictor"), f"{assembly.__name__} has no Predictor"
    with Path(path).open("a") as file:
        assembly.Predictor = lambda: TappedPredictor(file)
        sys.argv = ["kvferry.router", *arguments]
        return router_program.main()


if __name__ == "__main__":
    sys.exit(main())
