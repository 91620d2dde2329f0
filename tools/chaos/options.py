"""`Options` hold what `kvferry chaos` is asked for: its flags, and those of the deployments that it starts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import ConfigError
from ..load.arguments import Parser, named_path, output_file, positive_float, positive_int, share_or_none, shell_words
from .requests import ASK_KINDS, Ask, plan_asks
from .workers import KINDS, KNOWN_KINDS

FIRST_BLOW_AFTER_S = 2.0
_TINY_CACHE = "6MiB"  # 384 blocks: with one decode worker left, answers have to wait for blocks


@dataclass(slots=True, frozen=True)
class Options:
    """The command line, parsed."""

    model: Path | None
    num_experts: int
    num_prefill: int
    num_decode: int
    minutes: float
    every_s: float
    concurrency: int
    leaving: float  # the share of clients that do not wait for the end
    num_asks: int
    ask_kinds: tuple[str, ...]
    adapters: tuple[str, ...]  # names of those that requests are for, beside the model
    seed: int
    blows: tuple[str, ...]
    serve_flags: tuple[str, ...]
    reference_flags: tuple[str, ...] | None  # of the undisturbed deployment; None: the same
    json_path: Path | None
    history_path: Path | None
    log_dir: Path

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode

    def asks(self, model: str, vocab_size: int) -> list[Ask]:
        models = (model, *self.adapters)
        return plan_asks(self.num_asks, self.seed, models=models, vocab_size=vocab_size, kinds=self.ask_kinds)

    @property
    def flags(self) -> list[str]:
        """Return those of the deployment that is disturbed."""
        # A policy that hands every prompt over: handoffs are what is shot at.
        flags = ["--policy", "least_loaded", "--prefill", str(self.num_prefill), "--decode", str(self.num_decode)]
        # An admin listener for each router: it alone tells what that one holds.
        return [*flags, *self._common_flags, "--admin-port", "0", *self.serve_flags]

    @property
    def undisturbed_flags(self) -> list[str]:
        return self.flags if self.reference_flags is None else [*self._common_flags, *self.reference_flags]

    @property
    def _common_flags(self) -> list[str]:
        cache = [] if self.model is not None else ["--kv-cache-memory-bytes", _TINY_CACHE]
        return ["--deterministic", *cache]

    def title(self, num_routers: int) -> str:
        """Say what was run; `num_routers` did."""
        routers = "1 router" if num_routers == 1 else f"{num_routers} routers"
        return (
            f"{routers}, {self.num_prefill} prefill, {self.num_decode} decode workers; a blow every {self.every_s:g} s "
            f"for {self.minutes:g} min under {self.concurrency} requests in flight; seed {self.seed}"
        )


def parse_options(argv: Sequence[str]) -> Options:
    parsed = make_parser().parse_args(argv)
    for flag, path in (("--json", parsed.json), ("--history", parsed.history)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.parent}")
    if parsed.experts and (parsed.experts < 2 or parsed.model is not None):
        raise ConfigError("--experts: two or more, of the tiny model; a model of --model has its own")
    if 60 * parsed.minutes <= FIRST_BLOW_AFTER_S:
        raise ConfigError(f"--minutes {parsed.minutes:g}: the first blow comes after {FIRST_BLOW_AFTER_S:g} s")
    if any(word.partition("=")[0] == "--launcher" for word in parsed.serve_flags):
        raise ConfigError("--serve-flags: no --launcher: what is struck are processes of this machine")
    blows = _known("--blows", parsed.blows, KNOWN_KINDS)
    ask_kinds = _known("--requests", parsed.requests, ASK_KINDS)
    adapters = tuple(filter(None, parsed.adapters.split(",")))
    if parsed.num_requests < (least := len(ask_kinds) * (1 + len(adapters))):
        raise ConfigError(
            f"--num-requests {parsed.num_requests}: some would never be asked; {least} is one of each kind"
            + (" for each model" if adapters else "")
            + ", or name fewer with --requests"
        )
    return Options(
        model=parsed.model,
        num_experts=parsed.experts,
        num_prefill=parsed.prefill,
        num_decode=parsed.decode,
        minutes=parsed.minutes,
        every_s=parsed.every,
        concurrency=parsed.concurrency,
        leaving=parsed.leaving,
        num_asks=parsed.num_requests,
        ask_kinds=ask_kinds,
        adapters=adapters,
        seed=parsed.seed,
        blows=blows,
        serve_flags=parsed.serve_flags,
        reference_flags=parsed.reference_flags,
        json_path=parsed.json,
        history_path=parsed.history,
        log_dir=parsed.log_dir or Path(tempfile.mkdtemp(prefix="chaos-logs-")),
    )


def _known(flag: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    if not set(text.split(",")) <= set(known):
        raise ConfigError(f"{flag} {text}: these are known: {', '.join(known)}")
    return tuple(text.split(","))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="kvferry chaos",
        description="Kill workers of a deployment of its own under load; exit code 1 if anything is lost or changed.",
    )
    add = parser.add_argument
    add("--model", type=named_path, metavar="DIR", help="Hugging Face directory (default: a tiny random model)")
    add("--experts", type=int, default=0, metavar="N", help="of the tiny model (default: none, at least 2)")
    add("--prefill", type=positive_int, default=2, metavar="N", help="prefill workers (default: %(default)s)")
    add("--decode", type=positive_int, default=2, metavar="N", help="decode workers (default: %(default)s)")
    add("--minutes", type=positive_float, default=10.0, metavar="M", help="under load (default: %(default)g)")
    add("--every", type=positive_float, default=5.0, metavar="S", help="between two blows (default: %(default)g)")
    add("--concurrency", type=positive_int, default=8, metavar="N", help="requests in flight (default: %(default)s)")
    leaving = "of clients that do not wait for the end (default: %(default)g)"
    add("--leaving", type=share_or_none, default=0.1, metavar="SHARE", help=leaving)
    add("--num-requests", type=positive_int, default=330, metavar="N", help="distinct ones (default: %(default)s)")
    add("--seed", type=int, default=0, help="of requests, victims and signals (default: %(default)s)")
    kinds = "rank: another process of a worker; router: clients come back; restart: of all processes in turn"
    blows = f"drawn from, of {', '.join(KNOWN_KINDS)}; {kinds}"
    add("--blows", default=",".join(KINDS), metavar="KINDS", help=f"{blows} (default: %(default)s)")
    kinds = ",".join(ASK_KINDS)
    add("--requests", default=kinds, metavar="KINDS", help=f"of {', '.join(ASK_KINDS)} (default: all)")
    adapters = "which requests are for too, of --lora-modules among the flags for `kvferry serve`"
    add("--adapters", default="", metavar="NAMES", help=adapters)
    flags = "for `kvferry serve`, in one word: '--dtype bfloat16'"
    add("--serve-flags", type=shell_words, default=(), metavar="FLAGS", help=flags)
    flags = "of the undisturbed deployment in place of all these: '--prefill 0' (default: it is the same)"
    add("--reference-flags", type=shell_words, metavar="FLAGS", help=flags)
    add("--json", type=output_file, metavar="FILE", help="write all figures here")
    add("--history", type=output_file, metavar="FILE", help="write every event here, a JSON line each")
    add(
        "--log-dir", type=named_path, metavar="DIR", help="for the system's output (default: a new temporary directory)"
    )
    return parser
