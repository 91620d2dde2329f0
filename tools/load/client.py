"""`kvferry bench`: load on any OpenAI-compatible endpoint, and what its users would have felt.

A run: plan the requests -> ask the endpoint what it understands -> warm up -> load -> table, JSON, plot. The server
may be kvferry or another; nothing here reads more from it than its answers.
"""

from __future__ import annotations

import itertools
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter, process_time

from rich.console import Console

from ...common.errors import ConfigError
from .delivery import deliver
from .endpoint import Endpoint, RequestRecord
from .environment import describe_environment
from .http_client import HttpError
from .load import LoadResult, PlannedRequest, load_result, poisson_arrivals, run_closed_loop, run_open_loop
from .options import Options, make_parser, parse_options
from .plot import plot_report
from .prompts import PromptSource
from .report import BenchReport, print_report, report_console, write_json
from .stats import summarize
from .traces import TraceRow, read_trace

__all__ = ["main", "make_parser", "plan_requests", "read_rows", "run_bench"]  # the first two are what a program has

_WARMUP_SEED_OFFSET = 1_000_003  # warm-up prompts must not be in a prefix cache when the measured ones come


def main(argv: list[str] | None = None) -> int:
    """0: at least one request succeeded; 1: none did; 2: the settings are wrong; 130: interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse_options(argv)
        _raise_file_limit()
        report = _measure(_Run(options, argv))
    except (ConfigError, HttpError) as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        report = None
    if report is None:
        _tell("interrupted, nothing measured")
        return 130
    files = (
        (options.json_path, lambda path: write_json(report, path)),
        (options.plot_path, lambda path: plot_report(report, path)),
    )
    code = deliver("kvferry bench", files, lambda: print_report(report, report_console()))
    if report.num_cut_off is not None:
        _tell("interrupted; the figures are of what had finished")
        return 130
    return code if code or report.summary.num_ok else 1


def _tell(sentence: str) -> None:
    Console(stderr=True).print(f"kvferry bench: {sentence}", markup=False, style="red", soft_wrap=True)


def _measure(run: _Run) -> BenchReport | None:
    """Return the figures; where it is interrupted, those of what had finished, or None where nothing had."""
    import uvloop  # a third of asyncio's own cost for a received chunk

    try:
        return uvloop.run(run.measure())
    except KeyboardInterrupt:
        return run.report_so_far()


def _raise_file_limit() -> None:
    """Take what this process may have: each request in flight has a connection, and an open loop's have no bound."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run_bench(options: Options, argv: Sequence[str]) -> BenchReport:
    """One whole run against a server that is up."""
    return await _Run(options, argv).measure()


class _Run:
    """A run that may be interrupted: requests that have finished are kept."""

    def __init__(self, options: Options, argv: Sequence[str]) -> None:
        self._options = options
        self._rows = read_rows(options)  # what is wrong with a file is told before anybody is asked
        self._endpoint = Endpoint(
            options.base_url,
            model=options.model or "",
            name=options.endpoint,
            api_key=options.api_key,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
            timeout_s=options.timeout_s,
        )
        self._environment = describe_environment("kvferry bench", argv)  # before the load: what fails costs no figures
        self._finished: list[RequestRecord] = []
        self._num_sent = 0
        self._start_s = self._start_cpu_s = 0.0

    async def measure(self) -> BenchReport:
        try:
            await _probe(self._endpoint, self._options)
            await _warm_up(self._endpoint, self._options, self._rows)
            return self._report(await self._load(), None)
        finally:
            self._endpoint.close()

    def report_so_far(self) -> BenchReport | None:
        """Return what had finished when the run was interrupted; None: nothing had."""
        if not self._finished:
            return None
        load = load_result(self._finished, self._start_s, self._start_cpu_s)
        return self._report(load, self._num_sent - len(self._finished))

    async def _load(self) -> LoadResult:
        options, requests = self._options, plan_requests(self._options, self._rows)
        self._start_s, self._start_cpu_s = perf_counter(), process_time()
        if options.max_concurrency is not None:
            return await run_closed_loop(requests, self._send, options.max_concurrency, options.duration_s)
        return await run_open_loop(requests, self._send, options.duration_s)

    async def _send(self, request: PlannedRequest) -> RequestRecord:
        self._num_sent += 1
        record = await _send(self._endpoint, request)
        self._finished.append(record)
        return record

    def _report(self, load: LoadResult, num_cut_off: int | None) -> BenchReport:
        options = self._options
        return BenchReport(
            base_url=options.base_url,
            model=self._endpoint.model,
            load=options.load_in_words,
            workload=options.workload_in_words,
            slo=options.slo,
            summary=summarize(
                load.records, duration_s=load.duration_s, client_cpu_s=load.client_cpu_s, slo=options.slo
            ),
            environment=self._environment,
            records=load.records,
            num_cut_off=num_cut_off,
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


async def _warm_up(endpoint: Endpoint, options: Options, rows: Iterable[TraceRow]) -> None:
    warm_options = replace(options, seed=options.seed + _WARMUP_SEED_OFFSET, num_requests=options.num_warmups)
    for request in plan_requests(warm_options, rows):
        record = await _send(endpoint, request)
        if not record.is_ok:
            raise ConfigError(f"warm-up request failed: {record.error}")


async def _send(endpoint: Endpoint, request: PlannedRequest) -> RequestRecord:
    return await endpoint.send(request.prompt, request.num_output_tokens, index=request.index)


def plan_requests(options: Options, rows: Iterable[TraceRow]) -> Iterator[PlannedRequest]:
    """Requests in order of arrival, made one by one: a run of fixed duration has no last one."""
    prompts = _prompt_source(options, options.seed)
    arrivals = None if options.request_rate is None else poisson_arrivals(options.request_rate, options.seed)
    for index, row in enumerate(itertools.islice(rows, options.num_requests)):
        arrival_s = row.arrival_s if arrivals is None else next(arrivals)
        yield PlannedRequest(index, prompts.make_for(row), row.num_output_tokens, arrival_s)


def read_rows(options: Options) -> Iterable[TraceRow]:
    """Return the rows of the trace, or equal ones without end. Read once: it takes its time, and may be a pipe."""
    if options.trace is None:
        return itertools.repeat(TraceRow(0.0, options.input_len, options.output_len))
    trace = read_trace(options.trace, length_scale=options.trace_scale, rate_scale=options.trace_rate_scale)
    if options.num_requests is not None and options.num_requests > len(trace):
        raise ConfigError(
            f"--num-requests {options.num_requests}: --trace {options.trace} ends after {len(trace)}, and is not begun "
            "anew: ask for no more, or leave it away"
        )
    return trace


def _prompt_source(options: Options, seed: int) -> PromptSource:
    return PromptSource(seed, options.vocab_size if options.prompt == "ids" else None)


if __name__ == "__main__":
    sys.exit(main())
