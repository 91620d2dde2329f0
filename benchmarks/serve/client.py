"""One run of one load: vLLM's own client, `vllm bench serve`, against a server of either kind.

The client is the peer's and not ours, so that no figure rests on how we count. It sends random prompts of a fixed
length in closed loop, greedy, past the end-of-text token, and writes a JSON file:
1. wait for a quiet second on the machine
2. the client's warm-up requests, then the measured ones; meanwhile it is watched who uses the cores
3. read its file. A client that fails, or is not done in time, leaves a run without figures and with the reason

An answer that broke off after its first token counts as a success for the client: the tokens are counted again here.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import msgspec

from kvferry.benchmarks.shared.peers import RunningSystem, Setup
from kvferry.tools.load.cores import CoreUse, CoreWatch, QuietWait, wait_until_quiet
from kvferry.tools.load.server_process import ServerProcess, running

_SAMPLE_S = 0.5
_TERM_S = 5.0
_MAX_REASON_CHARS = 300
_HEAD_CHARS = 80
_MAX_REASONS = 5
_INPUT_TOLERANCE = 0.01


@dataclass(slots=True, frozen=True)
class Cell:
    """One load: every request of one shape, so many in flight."""

    input_len: int
    output_len: int
    concurrency: int
    num_requests: int

    @property
    def num_warmups(self) -> int:
        """None where a single request is the whole run: it costs as much as the measurement."""
        return self.concurrency if self.num_requests > 1 else 0

    def __str__(self) -> str:
        return f"{self.input_len}/{self.output_len}/{self.concurrency}"


DEFAULT_CELLS = (
    Cell(128, 64, 1, 8),
    Cell(512, 64, 4, 16),
    Cell(512, 64, 16, 48),
    Cell(700, 48, 8, 24),
    Cell(2048, 32, 2, 6),
    Cell(8192, 16, 1, 2),
    Cell(32000, 8, 1, 1),
)


def parse_cell(text: str) -> Cell:
    """`512/64/4`, or with the number of requests `512/64/4x16`. Raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)(?:x(\d+))?", text.strip())
    numbers = [int(number) for number in match.groups() if number] if match else []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{text!r} is not INPUT/OUTPUT/CONCURRENCY or INPUT/OUTPUT/CONCURRENCYxREQUESTS")
    input_len, output_len, concurrency, *rest = numbers
    known = {str(cell): cell.num_requests for cell in DEFAULT_CELLS}
    num_requests = rest[0] if rest else known.get(f"{input_len}/{output_len}/{concurrency}", 3 * concurrency)
    return Cell(input_len, output_len, concurrency, num_requests)


@dataclass(slots=True, frozen=True)
class ClientRun:
    """What the client saw in one run. The figures are None where no request succeeded."""

    round: int
    seed: int
    num_completed: int
    num_failed: int
    problems: tuple[str, ...]  # why requests failed, or what is wrong with the answers
    median_ttft_ms: float | None = None
    median_tpot_ms: float | None = None
    p99_itl_ms: float | None = None
    median_e2e_ms: float | None = None
    output_tokens_per_s: float | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    duration_s: float | None = None
    quiet: QuietWait | None = None  # before it
    cores: CoreUse | None = None  # during it, the client's start included

    @property
    def is_clean(self) -> bool:
        return not self.num_failed and not self.problems


class _Result(msgspec.Struct):
    """What is read of the client's file."""

    completed: int
    failed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    output_throughput: float
    median_ttft_ms: float
    median_tpot_ms: float
    p99_itl_ms: float
    median_e2el_ms: float
    errors: list[str] = []


def seed_of(base: int, cell: Cell, round_number: int, run_number: int) -> int:
    """The same for every system, and another for every other run, so that no cache of prompts answers one."""
    return zlib.crc32(f"{base} {cell} {round_number} {run_number}".encode()) & 0x7FFFFFFF


def failed_run(cell: Cell, round_number: int, seed: int, reason: str) -> ClientRun:
    return ClientRun(round_number, seed, 0, cell.num_requests, (_short(reason),))


def run_client(
    system: RunningSystem,
    setup: Setup,
    cell: Cell,
    *,
    label: str,
    round_number: int,
    seed: int,
    timeout_s: float,
    quiet_limit_s: float,
    quiet_sample_s: float = 1.0,
) -> ClientRun:
    """`label` names the client's log and result, `<label>.log` and `<label>.json`, in the setup's log directory."""
    result_path = setup.log_dir / f"{label}.json"
    result_path.unlink(missing_ok=True)
    quiet = wait_until_quiet(quiet_limit_s, quiet_sample_s)
    watch = CoreWatch(lambda: system.pids)
    watch.start()
    command = client_command(system, setup, cell, seed, result_path)
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    with running(label, command, setup.log_dir, env, term_s=_TERM_S) as client:
        code = _wait(client, watch, timeout_s)
        ended = f"the client did not end within {timeout_s:g} s" if code is None else f"the client ended with {code}"
        log_tail = client.log_tail()
    cores = watch.stop()
    run = failed_run(cell, round_number, seed, f"{ended}: {log_tail}")
    if code == 0 and result_path.exists():
        run = read_result(result_path.read_bytes(), cell, round_number, seed)
    return replace(run, quiet=quiet, cores=cores)


def _wait(client: ServerProcess, watch: CoreWatch, timeout_s: float) -> int | None:
    deadline_s = perf_counter() + timeout_s
    while (code := client.wait(_SAMPLE_S)) is None and perf_counter() < deadline_s:
        watch.sample()
    return code


def client_command(system: RunningSystem, setup: Setup, cell: Cell, seed: int, result_path: Path) -> list[str]:
    command = [str(setup.peer_venv / "bin" / "vllm"), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", system.base_url, "--endpoint", "/v1/completions"]
    command += ["--model", system.model, "--tokenizer", str(setup.model_dir)]
    command += ["--dataset-name", "random", "--random-range-ratio", "0", "--seed", str(seed)]
    command += ["--random-input-len", str(cell.input_len), "--random-output-len", str(cell.output_len)]
    command += ["--ignore-eos", "--temperature", "0", "--max-concurrency", str(cell.concurrency)]
    command += ["--num-prompts", str(cell.num_requests), "--num-warmups", str(cell.num_warmups)]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--disable-tqdm"]
    if setup.adapters:
        names = [path.name for path in setup.adapters]
        command += ["--lora-modules", *names, "--lora-assignment", "round-robin"]
    command += ["--save-result", "--save-detailed"]  # detailed: with the reasons of failures
    return [*command, "--result-dir", str(result_path.parent), "--result-filename", result_path.name]


def read_result(content: bytes, cell: Cell, round_number: int, seed: int) -> ClientRun:
    """A run from the client's file."""
    try:
        result = msgspec.json.decode(content, type=_Result)
    except msgspec.DecodeError as error:
        return failed_run(cell, round_number, seed, f"the client's file is not as expected: {error}")
    problems = sorted({_short(error) for error in result.errors if error})[:_MAX_REASONS]
    wrong = wrong_counts(result.completed, result.total_input_tokens, result.total_output_tokens, cell)
    run = ClientRun(
        round=round_number,
        seed=seed,
        num_completed=result.completed,
        num_failed=cell.num_requests - result.completed,
        problems=(*problems, *wrong),
        num_input_tokens=result.total_input_tokens,
        num_output_tokens=result.total_output_tokens,
        duration_s=round(result.duration, 3),
    )
    if not result.completed:
        return run
    return replace(
        run,
        median_ttft_ms=round(result.median_ttft_ms, 3),
        # An answer of one token has neither.
        median_tpot_ms=round(result.median_tpot_ms, 3) if cell.output_len > 1 else None,
        p99_itl_ms=round(result.p99_itl_ms, 3) if cell.output_len > 1 else None,
        median_e2e_ms=round(result.median_e2el_ms, 3),
        output_tokens_per_s=round(result.output_throughput, 3),
    )


def wrong_counts(num_completed: int, num_input_tokens: int, num_output_tokens: int, cell: Cell) -> list[str]:
    """Where the tokens of the answers, or of the prompts as the server counted them, are not those asked for."""
    wrong = []
    if (expected := num_completed * cell.output_len) != num_output_tokens:
        wrong.append(f"{num_output_tokens} output tokens instead of {expected}")
    # Random tokens that are written as text and read again may be one more or one fewer.
    if abs((expected := num_completed * cell.input_len) - num_input_tokens) > _INPUT_TOLERANCE * expected:
        wrong.append(f"{num_input_tokens} input tokens instead of {expected}")
    return wrong


def _short(reason: str) -> str:
    """Its beginning says what happened, its end what the error was."""
    words = " ".join(reason.split())
    if len(words) <= _MAX_REASON_CHARS:
        return words
    return f"{words[:_HEAD_CHARS]} ... {words[_HEAD_CHARS - _MAX_REASON_CHARS :]}"
