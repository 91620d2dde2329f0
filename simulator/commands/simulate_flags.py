"""The command line of `kvferry simulate`, and the flags in it that would change nothing."""

from __future__ import annotations

import argparse
import re

from ...common.errors import ConfigError
from ...sizing.hardware import CPU, GPUS
from ...sizing.shapes import MODELS
from ...tools.load.arguments import (
    Parser,
    multiple,
    named_path,
    natural,
    output_file,
    positive_float,
    positive_int,
    share,
    share_or_none,
)
from ..scenario import Failure, Spike
from ..sources import SOURCES
from .checkpoint import add_model_flags

# Of a flag, those of which one must be given: without them it changes nothing.
_NEEDS = {
    "num_speculative_tokens": ("draft_acceptance",),
    "draft_model_share": ("draft_acceptance",),
    "start_s": ("autoscale",),
    "spare_workers": ("autoscale",),
    "adapter_mb": ("adapters",),
    "max_loras": ("adapters",),
    "max_cpu_loras": ("adapters",),
    "no_noise": ("steps",),
    "day_low": ("day_s",),
    "share": ("capacity", "oracle"),
}
_NUMBER = r"(\d+(?:\.\d*)?)"
_SPIKE = re.compile(f"{_NUMBER}:{_NUMBER}:{_NUMBER}", re.ASCII)
_FAILURE = re.compile(rf"((?:prefill|decode)-\d+)@{_NUMBER}(?:\+{_NUMBER})?", re.ASCII)


def check_needs(options: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that another one has to be given with, and is not."""
    default = make_parser().get_default
    for name, needed in _NEEDS.items():
        if getattr(options, name) != default(name) and not any(getattr(options, other) for other in needed):
            flags = " or ".join(f"--{other.replace('_', '-')}" for other in needed)
            raise ConfigError(f"{name}: without {flags} it changes nothing: leave it away, or give that too")


def _spike(text: str) -> Spike:
    if (found := _SPIKE.fullmatch(text)) is None or not float(found[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not AT:SECONDS:FACTOR, as in 20:5:3")
    return Spike(float(found[1]), float(found[2]), float(found[3]))


def _failure(text: str) -> Failure:
    if (found := _FAILURE.fullmatch(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WORKER@AT[+BACK_AFTER], as in decode-0@20+60")
    return Failure(found[1], float(found[2]), float(found[3]) if found[3] else None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvferry simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_traffic(parser.add_argument_group("traffic"))
    _add_fleet(parser.add_argument_group("fleet"))
    add_model_flags(parser.add_argument_group("a checkpoint instead of published figures"))
    _add_goals(parser.add_argument_group("router and objectives"))
    group = parser.add_argument_group("run")
    group.add_argument("--capacity", action="store_true", help="search the highest rate at which --share is good")
    group.add_argument("--share", type=share, default=0.9, help="of requests, for --capacity and --oracle")
    group.add_argument("--oracle", action="store_true", help="also show the bound that no router can beat")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--step-by-step", action="store_true", help="every decode step is an event: slow, same results")
    group.add_argument("--json", type=output_file, metavar="FILE")
    group.add_argument("--plot", type=output_file, metavar="FILE", help=".svg or .png")
    return parser


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    names = ", ".join(SOURCES)
    group.add_argument("--trace", default="sample:azure-2023-conv", help=f"{names}, sample:NAME, or a file")
    group.add_argument("--part", choices=("whole", "first", "second"), default="whole", help="of the trace's time")
    group.add_argument("--rate", type=positive_float, help="mean requests per second; default: as recorded")
    group.add_argument("--poisson", action="store_true", help="Poisson arrivals; default: the recorded ones, scaled")
    group.add_argument("--requests", type=positive_int, help="default: all; more than there are: again from the start")
    group.add_argument("--length-scale", type=positive_float, default=1.0)
    group.add_argument("--spike", type=_spike, action="append", default=[], metavar="AT:SECONDS:FACTOR")
    group.add_argument("--day-s", type=positive_float, help="a sinusoidal day of so many seconds")
    text = "of the requests that want their prompt's embedding instead of an answer"
    group.add_argument("--embedding-share", type=share_or_none, default=0.0, metavar="X", help=text)
    group.add_argument("--day-low", type=share, default=0.2, help="its lowest rate, as a share of the highest")


def _add_fleet(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prefill", type=natural, default=2, help="workers; 0: colocated")
    group.add_argument("--decode", type=positive_int, default=2, help="workers")
    group.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}; with a checkpoint also {CPU}, measured")
    text = f"published figures: {', '.join(MODELS)}; or a checkpoint as of serve, whose config.json is enough"
    group.add_argument("--model", default="llama-3.1-70b", help=text)
    group.add_argument("--tensor-parallel-size", type=positive_int, default=4, help="GPUs of a worker")
    group.add_argument(
        "--steps", type=named_path, metavar="FILE", help="samples of a live worker's steps, instead of a GPU"
    )
    group.add_argument("--no-noise", action="store_true", help="with --steps: every step takes what the fit says")
    group.add_argument("--num-blocks", type=positive_int, help="of a worker; default: what fits into its memory")
    group.add_argument("--block-size", type=positive_int, help="tokens; default: as states demand, the trace's, or 64")
    group.add_argument("--max-num-seqs", type=positive_int, default=256)
    group.add_argument("--prefill-tokens", type=positive_int, help="largest step of a prefill worker; default: 8192")
    group.add_argument("--decode-tokens", type=positive_int, help="largest step of a decode worker; default: 2048")
    group.add_argument("--adapters", type=natural, default=0, help="that requests name, few often and many rarely")
    group.add_argument("--adapter-mb", type=positive_float, default=100.0, help="of an adapter's file")
    group.add_argument("--max-loras", type=positive_int, default=8, help="adapters in a step, on each worker")
    group.add_argument("--max-cpu-loras", type=positive_int, help="in its host memory (default: --max-loras)")
    group.add_argument("--draft-acceptance", type=positive_float, help="chance of a drafted token after right ones")
    group.add_argument("--num-speculative-tokens", type=positive_int, default=5, help="drafted, with that, at most")
    text = "of a step that a draft model's takes, and of a token's KV; default: drafts cost nothing to make"
    group.add_argument("--draft-model-share", type=float, default=0.0, metavar="X", help=text)
    group.add_argument("--fail", type=_failure, action="append", default=[], metavar="WORKER@AT[+BACK_AFTER]")
    group.add_argument("--autoscale", type=positive_int, metavar="N", help="the autoscaler decides, up to N workers")
    group.add_argument("--start-s", type=positive_float, default=60.0, help="that a new worker takes to start")
    group.add_argument("--spare-workers", type=natural, default=0)


def _add_goals(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--policy", default="slo", help="one or more, with commas; also: colocated")
    group.add_argument("--no-local-prefill", action="store_true")
    group.add_argument("--max-local-prefill-tokens", type=natural, default=0)
    group.add_argument("--ttft-objective-ms", type=positive_float, default=1000.0)
    group.add_argument("--ttft-stretch", type=multiple, default=3.0)
    group.add_argument("--tpot-objective-ms", type=positive_float, default=50.0)
    text = "neither router nor workers are told them: they only say which requests are good"
    group.add_argument("--no-objectives", action="store_true", help=text)
