"""What quantized weights cost in quality: the same text read by one model in several forms of its weights.

    python -m kvferry.benchmarks.quantization                                  # the built-in model
    python -m kvferry.benchmarks.quantization --dtype float32                  # weight-only arithmetic, the reference
    python -m kvferry.benchmarks.quantization --model DIR --kinds plain,int8,int4

Each form reads `text.txt` once as a prompt: perplexity is the exponent of the mean of what its tokens surprised the
model. Beside it stand how far its log-probabilities are from the first form's on average, how often its best next token
is that one's, and what the weights take. `gguf` is the built-in model's file as it is, of which its bfloat16 was made;
`int8-kv` has plain weights, and keys and values in 8 bits.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.shared.plain_steps import feed
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.config import EngineConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console

if TYPE_CHECKING:
    from kvferry.common.request import SampledToken

# torch is imported inside functions: its threads are settled before.

_TEXT = Path(__file__).with_name("text.txt")
KINDS = ("plain", "int8", "int4", "gguf", "int8-kv")


@dataclass(slots=True, frozen=True)
class Quality:
    kind: str
    computed_by: str
    perplexity: float
    distance: float  # of log-probabilities from the first kind's, on average
    same_best: float  # share of tokens
    weight_bytes: int  # beside bfloat16 activations


@dataclass(slots=True, frozen=True)
class Report:
    model: str
    num_tokens: int
    qualities: tuple[Quality, ...]
    environment: Environment


@benchmark("quantization")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)  # as the launcher does for a worker
    report = _measure(flags, argv)
    _print(report, report_console())
    save_json(asdict(report), flags.json)
    return 0


def _measure(flags: argparse.Namespace, argv: list[str]) -> Report:
    qualities: list[Quality] = []
    first: list[SampledToken] = []
    for kind in flags.kinds:
        tokens, by, weight_bytes = _read(flags, kind)
        first = first or tokens
        pairs = list(zip(first, tokens, strict=True))
        surprise = -sum(_logprob(token) for token in tokens) / len(tokens)
        qualities.append(
            Quality(
                kind=kind,
                computed_by=by,
                perplexity=math.exp(surprise),
                distance=sum(abs(_logprob(one) - _logprob(other)) for one, other in pairs) / len(pairs),
                same_best=sum(one.top[0][0] == other.top[0][0] for one, other in pairs) / len(pairs),
                weight_bytes=weight_bytes,
            )
        )
    return Report(
        model=(flags.model or default_model_dir()).name,
        num_tokens=len(first),
        qualities=tuple(qualities),
        environment=describe_environment("python -m kvferry.benchmarks.quantization", argv),
    )


def _logprob(token: SampledToken) -> float:
    assert token.logprob is not None
    return token.logprob


def config_of(kind: str, model_dir: Path | None, *, dtype: str, threads: int, cpu_isa: str = "auto") -> EngineConfig:
    """Return what an engine needs for one form of a model's weights; `model_dir` None: the built-in model."""
    model_dir = model_dir or default_model_dir(keeps_blocks=kind == "gguf")
    return EngineConfig.model_validate(
        {
            "model_dir": model_dir,
            "served_model_name": model_dir.name,
            "dtype": dtype,
            "device": "cpu",
            "num_threads": threads,
            "cpu_isa": cpu_isa,
            "quantization": None if kind in ("plain", "int8-kv") else kind,
            "kv_cache_dtype": "int8" if kind == "int8-kv" else "auto",
        }
    )


def _read(flags: argparse.Namespace, kind: str) -> tuple[list[SampledToken], str, int]:
    """Return the text's tokens as the model judges them, what computed that, and the bytes of its weights."""
    from kvferry.common.request import RequestId, SamplingParams, Sequence
    from kvferry.engine.engine import Engine
    from kvferry.models.config import ModelConfig
    from kvferry.models.tokenizer import Tokenizer
    from kvferry.sizing.memory import weight_bytes

    config = config_of(kind, flags.model, dtype=flags.dtype, threads=flags.threads)
    model_dir = config.model_dir
    ids = Tokenizer.from_dir(model_dir).encode(_TEXT.read_text(encoding="utf-8"))[: flags.tokens]
    engine = Engine(config, num_blocks=len(ids) // config.block_tokens + 1)
    seq = Sequence(RequestId("text"), 0, 0, ids, len(ids), SamplingParams(prompt_logprobs=1))
    seq.block_table = list(range(engine.num_blocks))
    tokens = feed(engine, seq, config.max_num_batched_tokens)
    as_served = config.model_copy(update={"dtype": "bfloat16"})  # in float32 they are widened
    return tokens, type(engine.runner).__name__, weight_bytes(as_served, ModelConfig.from_dir(model_dir))


def _print(report: Report, console: Console) -> None:
    table = Table(title=f"{report.model}, {report.num_tokens} tokens", title_justify="left")
    for column in ("weights", "computed by", "MB", "perplexity", "distance", "same best"):
        table.add_column(column, justify="left" if column in ("weights", "computed by") else "right")
    for each in report.qualities:
        table.add_row(
            each.kind,
            each.computed_by,
            f"{each.weight_bytes / 1e6:.0f}",
            f"{each.perplexity:.3f}",
            f"{each.distance:.4f}",
            f"{each.same_best:.1%}",
        )
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("quantization", __doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--kinds", type=names_of(KINDS), default=KINDS, metavar="KIND,…", help=f"of {', '.join(KINDS)} (default: all)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="(default: %(default)s)")
    add("--tokens", type=positive_int, default=None, metavar="N", help="read so many of the text's (default: all)")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add(
        "--json",
        type=output_file,
        default=RESULTS_DIR / "quantization.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
