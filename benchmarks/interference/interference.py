"""What a long prompt does to those who are reading an answer.

    python -m kvferry.benchmarks.interference [--systems kvferry-pd,kvferry-co,vllm-agg,vllm-pd] [--duration 120]

Each system is started in turn on the same cores and meets the same load:
1. warm-up: one short and one long request;
2. quiet: three steady streams, each a short prompt whose long answer is read, sent anew when it ends;
3. disturbed: the same streams, and a 6,000-token prompt always in flight: the next is sent when one is answered.

Measured: the gaps between tokens inside each stream, quiet and disturbed, the TTFT of the streams as they are sent
anew, and the long prompts' TTFT in order. A prompt never comes twice, so no prefix cache answers one. A wait that is
still open when its phase ends (for the next token, or a stream's first) counts with the time it has lasted, so that a
server which stops answering is seen. Cores used by programs that have nothing to do with the measurement are recorded
for each phase.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console

from kvferry.benchmarks.interference.report import (
    InterferenceReport,
    Phase,
    SystemResult,
    long_prompts,
    plot_interference,
    print_interference,
    write_interference,
)
from kvferry.benchmarks.peers.vllm_install import default_venv, ensure_vllm
from kvferry.benchmarks.shared.peers import DEFAULT_SYSTEMS, SYSTEMS, VLLM_DTYPES, RunningSystem, Setup, system_names
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.errors import ConfigError
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.cores import CoreUse, CoreWatch, pin_to_cores
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.report import report_console
from kvferry.tools.load.stats import describe

_FIRST_TOKENS_WITHIN_S = 60.0


@dataclass(slots=True, frozen=True)
class Scenario:
    """The load."""

    num_streams: int = 3
    stream_input_len: int = 100
    stream_output_len: int = 400
    long_input_len: int = 6000
    long_output_len: int = 8
    quiet_s: float = 30.0
    disturbed_s: float = 120.0
    vocab_size: int = 4096
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.num_streams} streams of {self.stream_input_len} tokens in, {self.stream_output_len} out; "
            f"then also a {self.long_input_len}-token prompt always in flight"
        )


Ask = Callable[[RequestRecord], Awaitable[RequestRecord]]


class SteadyLoad:
    """`num_lanes` requests in flight, each sent anew when it ends. Every record is kept, unfinished ones too."""

    def __init__(self, ask: Ask, num_lanes: int, num_asked_tokens: int) -> None:
        self.records: list[RequestRecord] = []
        self._ask = ask
        self._num_asked_tokens = num_asked_tokens
        self._lanes = [asyncio.ensure_future(self._run_lane()) for _ in range(num_lanes)]

    async def _run_lane(self) -> None:
        while True:
            record = RequestRecord(len(self.records), perf_counter(), self._num_asked_tokens)
            self.records.append(record)
            await self._ask(record)
            if record.error is not None:
                await asyncio.sleep(0.5)  # a server that refuses must not be flooded

    async def stop(self) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)


async def measure(system: RunningSystem, name: str, scenario: Scenario) -> SystemResult:
    """Warm-up, quiet and disturbed phase on a system that is up."""
    prompts = PromptSource(scenario.seed, scenario.vocab_size)
    streams_endpoint = Endpoint(system.base_url, model=system.model, ignore_eos=True, temperature=0.0)
    # A stream's tokens are counted by their ids. With them, servers send the prompt's ids back too: not for long ones.
    long_endpoint = Endpoint(
        system.base_url, model=system.model, ignore_eos=True, temperature=0.0, return_token_ids=False
    )

    async def ask_stream(record: RequestRecord) -> RequestRecord:
        prompt = prompts.make(scenario.stream_input_len)
        return await streams_endpoint.send(prompt, scenario.stream_output_len, record=record)

    async def ask_long(record: RequestRecord) -> RequestRecord:
        return await long_endpoint.send(prompts.make(scenario.long_input_len), scenario.long_output_len, record=record)

    await _warm_up(ask_stream, ask_long, scenario)
    watch = CoreWatch(lambda: system.pids)
    streams = SteadyLoad(ask_stream, scenario.num_streams, scenario.stream_output_len)
    try:
        await _until_all_read(streams, scenario.num_streams)
        quiet = await _phase(streams, watch, scenario.quiet_s)
        longs = SteadyLoad(ask_long, 1, scenario.long_output_len)
        try:
            disturbed = await _phase(streams, watch, scenario.disturbed_s)
            answered = long_prompts(longs.records, perf_counter())
        finally:
            await longs.stop()
    finally:
        await streams.stop()
        streams_endpoint.close()
        long_endpoint.close()
    return SystemResult(name, system.about, quiet, disturbed, answered)


async def _warm_up(ask_stream: Ask, ask_long: Ask, scenario: Scenario) -> None:
    for ask, num_tokens in ((ask_stream, scenario.stream_output_len), (ask_long, scenario.long_output_len)):
        record = await ask(RequestRecord(0, 0.0, num_tokens))
        if not record.is_ok:
            raise ConfigError(f"warm-up failed: {record.error}")


async def _until_all_read(streams: SteadyLoad, num_streams: int) -> None:
    """A phase begins with every stream under way."""
    for _ in range(int(_FIRST_TOKENS_WITHIN_S / 0.05)):
        if sum(bool(record.chunk_times_s) for record in streams.records) >= num_streams:
            return
        await asyncio.sleep(0.05)
    errors = sorted({record.error for record in streams.records if record.error is not None})
    raise ConfigError(f"the streams did not begin within {_FIRST_TOKENS_WITHIN_S:g} s: {'; '.join(errors)}")


async def _phase(streams: SteadyLoad, watch: CoreWatch, duration_s: float) -> Phase:
    watch.start()
    sampling = asyncio.ensure_future(watch.keep_sampling())
    start_s = perf_counter()
    await asyncio.sleep(duration_s)
    end_s = perf_counter()
    sampling.cancel()
    with suppress(asyncio.CancelledError):
        await sampling
    return cut_phase(streams.records, start_s, end_s, watch.stop())


def cut_phase(records: Sequence[RequestRecord], start_s: float, end_s: float, cores: CoreUse) -> Phase:
    """What the streams' readers saw between two moments."""
    token_gaps_ms: list[float] = []
    chunk_gaps_ms: list[float] = []
    ttfts_ms: list[float] = []
    num_tokens = 0
    for record in records:
        times, counts = record.chunk_times_s, record.chunk_tokens
        for index, (now_s, count) in enumerate(zip(times, counts, strict=True)):
            if not start_s <= now_s < end_s:
                continue
            num_tokens += count
            token_gaps_ms += [0.0] * (count - 1)
            waited_s = now_s - (times[index - 1] if index else record.sent_s)
            (chunk_gaps_ms if index else ttfts_ms).append(waited_s * 1e3)
        last_s = times[-1] if times else record.sent_s
        if record.finished_s is None and last_s < end_s:
            (chunk_gaps_ms if times else ttfts_ms).append((end_s - max(last_s, start_s)) * 1e3)
    return Phase(
        duration_s=end_s - start_s,
        token_gap_ms=describe(token_gaps_ms + chunk_gaps_ms),
        chunk_gap_ms=describe(chunk_gaps_ms),
        stream_ttft_ms=describe(ttfts_ms),
        stream_tokens_per_s=num_tokens / (end_s - start_s),
        num_failed=sum(record.error is not None for record in records if start_s <= (record.finished_s or 0) < end_s),
        cores=cores,
    )


def run(setup: Setup, scenario: Scenario, names: Sequence[str], console: Console) -> list[SystemResult]:
    """Every system in turn, each gone before the next is started. One that fails is told and left out."""
    import uvloop

    results = []
    for name in names:
        console.print(f"{name}: starting", style="dim")
        try:
            with SYSTEMS[name](setup) as system:
                console.print(f"{name}: measuring for {scenario.quiet_s + scenario.disturbed_s:g} s", style="dim")
                results.append(uvloop.run(measure(system, name, scenario)))
        except ConfigError as error:
            console.print(f"not measured: {error}", markup=False, style="red", soft_wrap=True)
    return results


@benchmark("interference")
def main(argv: list[str]) -> int:
    """0: every system was measured; 1: some were; 2: none, or the settings are wrong."""
    flags = _parser().parse_args(argv)
    scenario = Scenario(
        quiet_s=flags.quiet,
        disturbed_s=flags.duration,
        stream_output_len=flags.stream_output_len,
        long_input_len=flags.long_input_len,
        seed=flags.seed,
    )
    console = Console(stderr=True)
    check_plot_path(flags.plot)
    setup = _setup(flags)
    if any(name.startswith("vllm") for name in flags.systems):
        ensure_vllm(setup.peer_venv)
    results = run(setup, scenario, flags.systems, console)
    if not results:
        return 2
    environment = describe_environment("python -m kvferry.benchmarks.interference", argv)
    report = InterferenceReport(setup.served_name, str(scenario), setup.cores, tuple(results), environment)
    print_interference(report, report_console())
    write_interference(report, flags.json)
    plot_interference(report, flags.plot)
    console.print(f"written: {flags.json}, {flags.plot}; logs of the servers: {setup.log_dir}", style="dim")
    return 0 if len(results) == len(flags.systems) else 1


def _setup(flags: argparse.Namespace) -> Setup:
    return Setup(
        model_dir=flags.model or default_model_dir(),
        log_dir=flags.log_dir or Path(tempfile.mkdtemp(prefix="interference-")),
        peer_venv=flags.peer_venv,
        cores=pin_to_cores(flags.num_cores),
        vllm_dtype=flags.vllm_dtype,
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("interference", __doc__)
    add = parser.add_argument
    names = f"some of {','.join(SYSTEMS)} (default: {','.join(DEFAULT_SYSTEMS)})"
    add("--systems", type=system_names, default=DEFAULT_SYSTEMS, help=names)
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add("--quiet", type=float, default=30.0, metavar="S", help="streams alone (default: %(default)g)")
    add("--duration", type=float, default=120.0, metavar="S", help="streams and long prompts (default: %(default)g)")
    add("--stream-output-len", type=positive_int, default=400, metavar="TOKENS", help="(default: %(default)s)")
    add("--long-input-len", type=positive_int, default=6000, metavar="TOKENS", help="(default: %(default)s)")
    add("--vllm-dtype", choices=VLLM_DTYPES, default=VLLM_DTYPES[0], help="(default: %(default)s)")
    add("--num-cores", type=positive_int, default=2, metavar="N", help="for server and client (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--peer-venv", type=Path, default=default_venv(), help="vLLM is installed here (default: %(default)s)")
    add("--log-dir", type=Path, metavar="DIR", help="for the servers' output (default: a new temporary directory)")
    add(
        "--json",
        type=output_file,
        default=RESULTS_DIR / "interference.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    add(
        "--plot",
        type=output_file,
        default=RESULTS_DIR / "interference.svg",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
