"""Random models and settings under load, whose answers must be a lone server's to the bit. For hours, by hand.

python -m kvferry.tests.deployments --minutes 60              one after the other, from seed 1 on
python -m kvferry.tests.deployments --seed 17                 that of one seed, again

Each is a run of `kvferry chaos`, whose references a server without any of the settings gives. Exit code 1: answers
differed, were lost or blocks leaked in some; their logs are kept.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from rich.console import Console

from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.command import run
from kvferry.tools.chaos.options import Options
from kvferry.tools.chaos.requests import ASK_KINDS
from kvferry.tools.chaos.tally import Tally
from kvferry.tools.load.http_client import HttpError

from ..e2e.exactness_models import write_exactness_model
from .drawn import Drawn, draw

_NUM_ASKS = 3 * len(ASK_KINDS)


@dataclass
class Report:
    """What came of the deployments so far."""

    ends: Counter[str] = field(default_factory=Counter)  # of these kinds: good, bad, not run
    num_answers: int = 0
    num_deaths: int = 0


def run_drawn(drawn: Drawn, folder: Path, minutes: float, console: Console) -> Tally:
    """Serve, strike, compare. Raises ConfigError when a deployment does not start, its output in the message."""
    model = write_exactness_model(folder / drawn.family, drawn.family)
    adapters = drawn.write_adapters(model, folder)
    options = Options(
        model=model.path,
        num_experts=0,
        num_prefill=drawn.num_prefill,
        num_decode=drawn.num_decode,
        minutes=minutes,
        every_s=drawn.every_s,
        concurrency=drawn.concurrency,
        leaving=0.1,
        num_asks=_NUM_ASKS,
        ask_kinds=tuple(ASK_KINDS),
        adapters=drawn.adapters,
        seed=drawn.seed,
        blows=drawn.blows,
        serve_flags=drawn.serve_flags(model, adapters, folder),
        reference_flags=drawn.reference_flags(adapters),
        json_path=None,
        history_path=folder / "history.jsonl",
        log_dir=folder / "logs",
    )
    options.log_dir.mkdir()
    return run(options, console)


def take(drawn: Drawn, report: Report, minutes: float, console: Console) -> None:
    """Run a deployment, and enter what came of it. Its folder stays where anything was wrong."""
    folder = Path(tempfile.mkdtemp(prefix=f"deployment-{drawn.seed}-"))
    console.print(str(drawn), markup=False, highlight=False, soft_wrap=True)
    try:
        found = run_drawn(drawn, folder, minutes, Console(quiet=True))
    except (ConfigError, HttpError) as error:
        report.ends["not run"] += 1
        console.print(f"  not run, {folder}: {error}", markup=False, highlight=False, soft_wrap=True)
        return
    report.num_answers += found.num_answered
    report.num_deaths += found.num_deaths
    if found.is_good:
        report.ends["good"] += 1
        console.print(f"  {found.num_answered} answers, {found.num_deaths} deaths", highlight=False)
        shutil.rmtree(folder)
        return
    broken = {name: number for name, number in found.broken.items() if number} or found.lack
    report.ends["bad"] += 1
    console.print(f"  BAD, {folder}: {broken}", markup=False, highlight=False, soft_wrap=True)
    for line in [*found.failures, *found.breaches][:8]:
        console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m kvferry.tests.deployments", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the one deployment to run")
    parser.add_argument("--first-seed", type=int, default=1, help="of many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all together (default: %(default)g)")
    parser.add_argument("--load", type=float, default=0.3, help="minutes of each (default: %(default)g)")
    asked = parser.parse_args()
    console, report, end_s = Console(), Report(), time.monotonic() + 60 * asked.minutes
    seeds = [asked.seed] if asked.seed is not None else itertools.count(asked.first_seed)
    for seed in seeds:
        if time.monotonic() > end_s:
            break
        take(draw(seed), report, asked.load, console)
    counts = ", ".join(f"{report.ends[end]} {end}" for end in ("good", "bad", "not run"))
    console.print(f"{counts}; {report.num_answers} answers, {report.num_deaths} deaths", highlight=False)
    return 1 if report.ends["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
