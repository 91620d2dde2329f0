"""`kvferry bench`: load on any OpenAI-compatible endpoint, and what its users would have felt.

A run: plan the requests -> ask the endpoint what it understands -> warm up -> load -> table, JSON, plot. The server
may be kvferry or another; nothing here reads more from it than its answers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from ...common.errors import ConfigError
from .arguments import positive_float, positive_int
from .endpoint import Endpoint, EndpointName, RequestRecord
from .environment import describe_environment
from .http_client import HttpError
from .load import LoadResult, PlannedRequest, poisson_arrivals, run_closed_loop, run_open_loop
from .plot import check_plot_path, plot_report
from .prompts import PromptSource
from .report import BenchReport, print_report, report_console, write_json
from .stats import Slo, summarize
from .traces import TraceRow, read_trace

_DEFAULT_NUM_REQUESTS = 100
_WARMUP_SEED_OFFSET = 1_000_003  # warm-up prompts must not be in a prefix cache when the measured ones come


@dataclass(slots=True, frozen=True)
class Options:
    """The command line, parsed and checked."""

    base_url: str
    model: str | None
    api_key: str | None
    endpoint: EndpointName
    prompt: str  # "ids" or "text"
    vocab_size: int
    input_len: int
    output_len: int
    trace: Path | None
    trace_scale: float
    trace_rate_scale: float
    request_rate: float | None
    max_concurrency: int | None
    num_requests: int | None
    duration_s: float | None
    num_warmups: int
    seed: int
    ignore_eos: bool
    temperature: float | None
    timeout_s: float
    slo: Slo
    json_path: Path | None
    plot_path: Path | None

    @property
    def load_in_words(self) -> str:
        if self.max_concurrency is not None:
            return f"closed loop, {self.max_concurrency} in flight"
        if self.request_rate is not None:
            return f"open loop, Poisson {self.request_rate:g}/s"
        return f"open loop, the trace's arrivals at {self.trace_rate_scale:g} times its rate"

    @property
    def workload_in_words(self) -> str:
        if self.trace is not None:
            return f"lengths of {self.trace.name} times {self.trace_scale:g}"
        return f"{self.input_len} tokens in, {self.output_len} out"


def main(argv: list[str] | None = None) -> int:
    """0: at least one request succeeded; 1: none did; 2: the settings are wrong; 130: interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True)
    try:
        options = parse_options(argv)
        report = _run(options, argv)
        print_report(report, report_console())
        if options.json_path is not None:
            write_json(report, options.json_path)
        if options.plot_path is not None:
            plot_report(report, options.plot_path)
    except (ConfigError, HttpError) as error:
        errors.print(f"kvferry bench: {error}", markup=False, style="red", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("kvferry bench: interrupted, nothing measured", style="red")
        return 130
    return 0 if report.summary.num_ok else 1


def _run(options: Options, argv: Sequence[str]) -> BenchReport:
    import uvloop  # a third of asyncio's own cost for a received chunk

    return uvloop.run(run_bench(options, argv))


async def run_bench(options: Options, argv: Sequence[str]) -> BenchReport:
    """One whole run against a server that is up."""
    endpoint = Endpoint(
        options.base_url,
        model=options.model or "",
        name=options.endpoint,
        api_key=options.api_key,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        timeout_s=options.timeout_s,
    )
    try:
        await _probe(endpoint, options)
        await _warm_up(endpoint, options)
        result = await _load(endpoint, options)
    finally:
        endpoint.close()
    return BenchReport(
        base_url=options.base_url,
        model=endpoint.model,
        load=options.load_in_words,
        workload=options.workload_in_words,
        slo=options.slo,
        summary=summarize(
            result.records, duration_s=result.duration_s, client_cpu_s=result.client_cpu_s, slo=options.slo
        ),
        environment=describe_environment("kvferry bench", argv),
        records=result.records,
    )


async def _probe(endpoint: Endpoint, options: Options) -> None:
    """Finds the model's name, and whether the server knows `return_token_ids`. Raises if it does not answer."""
    if options.model is None:
        endpoint.model = await _only_model(endpoint)
    prompt = _prompt_source(options, options.seed + _WARMUP_SEED_OFFSET).make(4)
    answer = await endpoint.send(prompt, 1)
    if answer.status in (400, 422) and "return_token_ids" in (answer.error or ""):
        endpoint.return_token_ids = False
        answer = await endpoint.send(prompt, 1)
    if not answer.is_ok:
        raise ConfigError(f"{options.base_url} does not answer a request of 4 tokens in, 1 out: {answer.error}")


async def _only_model(endpoint: Endpoint) -> str:
    names = await endpoint.model_names()
    if len(names) != 1:
        raise ConfigError(f"the server lists {len(names)} models ({', '.join(names)}): choose one with --model")
    return names[0]


async def _warm_up(endpoint: Endpoint, options: Options) -> None:
    warm_options = replace(options, seed=options.seed + _WARMUP_SEED_OFFSET, num_requests=options.num_warmups)
    for request in plan_requests(warm_options):
        record = await _send(endpoint, request)
        if not record.is_ok:
            raise ConfigError(f"warm-up request failed: {record.error}")


async def _load(endpoint: Endpoint, options: Options) -> LoadResult:
    async def send(request: PlannedRequest) -> RequestRecord:
        return await _send(endpoint, request)

    requests = plan_requests(options)
    if options.max_concurrency is not None:
        return await run_closed_loop(requests, send, options.max_concurrency, options.duration_s)
    return await run_open_loop(requests, send, options.duration_s)


async def _send(endpoint: Endpoint, request: PlannedRequest) -> RequestRecord:
    return await endpoint.send(request.prompt, request.num_output_tokens, index=request.index)


def plan_requests(options: Options) -> Iterator[PlannedRequest]:
    """Requests in order of arrival, made one by one: a run of fixed duration has no last one."""
    prompts = _prompt_source(options, options.seed)
    rows = _rows(options)
    arrivals = None if options.request_rate is None else poisson_arrivals(options.request_rate, options.seed)
    for index, row in enumerate(itertools.islice(rows, options.num_requests)):
        arrival_s = row.arrival_s if arrivals is None else next(arrivals)
        yield PlannedRequest(index, prompts.make_for(row), row.num_output_tokens, arrival_s)


def _rows(options: Options) -> Iterator[TraceRow]:
    if options.trace is not None:
        yield from read_trace(options.trace, length_scale=options.trace_scale, rate_scale=options.trace_rate_scale)
    else:
        yield from itertools.repeat(TraceRow(0.0, options.input_len, options.output_len))


def _prompt_source(options: Options, seed: int) -> PromptSource:
    return PromptSource(seed, options.vocab_size if options.prompt == "ids" else None)


def parse_options(argv: Sequence[str]) -> Options:
    """Raises ConfigError where flags contradict each other; argparse exits for the rest."""
    flags = make_parser().parse_args(argv)
    if flags.request_rate is not None and flags.max_concurrency is not None:
        raise ConfigError("--request-rate is open loop, --max-concurrency closed loop: give one of them")
    if flags.endpoint == "chat" and flags.prompt == "ids":
        raise ConfigError("--endpoint chat takes text: use --prompt text, or --endpoint completions")
    for flag, path in (("--json", flags.json), ("--plot", flags.plot)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.parent}")
    if flags.plot is not None:
        check_plot_path(flags.plot)
    max_concurrency, num_requests = flags.max_concurrency, flags.num_requests
    if flags.trace is None:
        if flags.request_rate is None and max_concurrency is None:
            max_concurrency = 1
        if num_requests is None and flags.duration is None:
            num_requests = _DEFAULT_NUM_REQUESTS
    return Options(
        base_url=flags.base_url,
        model=flags.model,
        api_key=flags.api_key,
        endpoint=flags.endpoint,
        prompt=flags.prompt or ("text" if flags.endpoint == "chat" else "ids"),
        vocab_size=flags.vocab_size,
        input_len=flags.input_len,
        output_len=flags.output_len,
        trace=flags.trace,
        trace_scale=flags.trace_scale,
        trace_rate_scale=flags.trace_rate_scale,
        request_rate=flags.request_rate,
        max_concurrency=max_concurrency,
        num_requests=num_requests,
        duration_s=flags.duration,
        num_warmups=flags.num_warmups,
        seed=flags.seed,
        ignore_eos=flags.ignore_eos,
        temperature=flags.temperature,
        timeout_s=flags.timeout,
        slo=Slo(flags.ttft_slo_ms, flags.tpot_slo_ms),
        json_path=flags.json,
        plot_path=flags.plot,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvferry bench",
        description="Load an OpenAI-compatible endpoint and report TTFT, TPOT, ITL, throughput and goodput.",
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_workload_flags(parser.add_argument_group("requests"))
    _add_load_flags(parser.add_argument_group("load (default: closed loop, one in flight; with --trace: its arrivals)"))
    _add_report_flags(parser.add_argument_group("report"))
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="without /v1 (default: %(default)s)")
    group.add_argument("--model", help="name in the requests (default: the only one that the server lists)")
    group.add_argument("--api-key", help="sent as bearer token")
    group.add_argument(
        "--endpoint",
        choices=get_args(EndpointName),
        default="completions",
        help="which API to call (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=positive_float,
        default=600.0,
        metavar="S",
        help="for one whole request (default: %(default)g)",
    )


def _add_workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input-len", type=positive_int, default=512, metavar="TOKENS", help="of each prompt (default: %(default)s)"
    )
    group.add_argument(
        "--output-len",
        type=positive_int,
        default=64,
        metavar="TOKENS",
        help="max_tokens of each request (default: %(default)s)",
    )
    group.add_argument("--trace", type=Path, metavar="FILE", help="lengths from a Mooncake .jsonl or Azure .csv trace")
    group.add_argument(
        "--trace-scale",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="trace lengths times X (default: %(default)g)",
    )
    group.add_argument(
        "--trace-rate-scale",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="trace arrivals X times as dense (default: %(default)g)",
    )
    group.add_argument("--prompt", choices=("ids", "text"), help="what is sent (default: ids; chat: text)")
    group.add_argument(
        "--vocab-size", type=positive_int, default=4096, help="prompt ids are below this (default: %(default)s)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="answers as long as asked for")
    group.add_argument("--temperature", type=float, help="(default: the server's)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of prompts and arrivals; an equal seed repeats the prompts (default: %(default)s)",
    )


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate", type=positive_float, metavar="PER_S", help="open loop: Poisson arrivals; inf: all at once"
    )
    group.add_argument("--max-concurrency", type=positive_int, metavar="N", help="closed loop: N in flight")
    group.add_argument(
        "--num-requests", type=positive_int, metavar="N", help=f"(default: {_DEFAULT_NUM_REQUESTS}, or the whole trace)"
    )
    group.add_argument("--duration", type=positive_float, metavar="S", help="send nothing new after this long")
    group.add_argument(
        "--num-warmups",
        type=int,
        default=1,
        metavar="N",
        help="requests before the run, not counted (default: %(default)s)",
    )


def _add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ttft-slo-ms", type=positive_float, metavar="MS", help="a good request's first token comes within this"
    )
    group.add_argument(
        "--tpot-slo-ms", type=positive_float, metavar="MS", help="a good request's mean token time is within this"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the distributions here (.svg or .png)")


if __name__ == "__main__":
    sys.exit(main())
