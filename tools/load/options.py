"""The command line of `kvferry bench`: what is asked of whom, how often, and where the figures go."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ...common.config import API_KEY_VARIABLE, environment, keys_of
from ...common.errors import ConfigError
from .arguments import (
    Parser,
    finite_float,
    named_path,
    natural,
    output_file,
    positive_float,
    positive_int,
    positive_or_infinite,
)
from .endpoint import EndpointName
from .plot import check_plot_path
from .stats import Slo

_DEFAULT_NUM_REQUESTS = 100
_DEFAULT_INPUT_LEN = 512
_DEFAULT_OUTPUT_LEN = 64


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


def parse_options(argv: Sequence[str]) -> Options:
    """Raises ConfigError where flags contradict each other; argparse exits for the rest."""
    flags = make_parser().parse_args(argv)
    if flags.request_rate is not None and flags.max_concurrency is not None:
        raise ConfigError("--request-rate is open loop, --max-concurrency closed loop: give one of them")
    _check_trace_flags(flags)
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
        if num_requests is None and flags.request_rate == float("inf"):
            raise ConfigError("--request-rate inf sends all at once, which --duration does not end: add --num-requests")
    return Options(
        base_url=flags.base_url,
        model=flags.model,
        api_key=flags.api_key or _key_of_environment(),
        endpoint=flags.endpoint,
        prompt=flags.prompt or ("text" if flags.endpoint == "chat" else "ids"),
        vocab_size=flags.vocab_size,
        input_len=flags.input_len or _DEFAULT_INPUT_LEN,
        output_len=flags.output_len or _DEFAULT_OUTPUT_LEN,
        trace=flags.trace,
        trace_scale=flags.trace_scale or 1.0,
        trace_rate_scale=flags.trace_rate_scale or 1.0,
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


def _check_trace_flags(flags: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that changes nothing with a trace, or without one."""
    for name in ("input_len", "output_len"):
        if flags.trace is not None and getattr(flags, name) is not None:
            raise ConfigError(f"--{_dashed(name)}: lengths are those of --trace; --trace-scale multiplies them")
    for name in ("trace_scale", "trace_rate_scale"):
        if flags.trace is None and getattr(flags, name) is not None:
            raise ConfigError(f"--{_dashed(name)}: there is no trace: name one with --trace, or leave this away")
    for name in ("request_rate", "max_concurrency"):
        if flags.trace_rate_scale is not None and getattr(flags, name) is not None:
            raise ConfigError(f"--trace-rate-scale: --{_dashed(name)} takes no arrivals of the trace: give one of them")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _key_of_environment() -> str | None:
    """Return the first key there: a key that is given as a flag is moved there before this program runs."""
    return next(iter(keys_of(environment(), API_KEY_VARIABLE)), None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    group.add_argument("--api-key", help=f"sent as bearer token (default: {API_KEY_VARIABLE})")
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
        "--input-len", type=positive_int, metavar="TOKENS", help=f"of each prompt (default: {_DEFAULT_INPUT_LEN})"
    )
    group.add_argument(
        "--output-len",
        type=positive_int,
        metavar="TOKENS",
        help=f"max_tokens of each request (default: {_DEFAULT_OUTPUT_LEN})",
    )
    group.add_argument(
        "--trace", type=named_path, metavar="FILE", help="lengths from a Mooncake .jsonl or Azure .csv trace"
    )
    group.add_argument(
        "--trace-scale",
        type=positive_float,
        metavar="X",
        help="trace lengths times X (default: 1)",
    )
    group.add_argument(
        "--trace-rate-scale",
        type=positive_float,
        metavar="X",
        help="trace arrivals X times as dense (default: 1)",
    )
    group.add_argument("--prompt", choices=("ids", "text"), help="what is sent (default: ids; chat: text)")
    group.add_argument(
        "--vocab-size", type=positive_int, default=4096, help="prompt ids are below this (default: %(default)s)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="answers as long as asked for")
    group.add_argument("--temperature", type=finite_float, metavar="X", help="(default: the server's)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of prompts and arrivals; an equal seed repeats the prompts (default: %(default)s)",
    )


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=positive_or_infinite,
        metavar="PER_S",
        help="open loop: Poisson arrivals; inf: all at once",
    )
    group.add_argument("--max-concurrency", type=positive_int, metavar="N", help="closed loop: N in flight")
    group.add_argument(
        "--num-requests", type=positive_int, metavar="N", help=f"(default: {_DEFAULT_NUM_REQUESTS}, or the whole trace)"
    )
    group.add_argument("--duration", type=positive_float, metavar="S", help="send nothing new after this long")
    group.add_argument(
        "--num-warmups",
        type=natural,
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
    group.add_argument("--json", type=output_file, metavar="FILE", help="write all figures here")
    group.add_argument("--plot", type=output_file, metavar="FILE", help="draw the distributions here (.svg or .png)")
