"""Log-probabilities that tests of C++ hold against others."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import median

from kvferry.common.config import EngineConfig
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.group import RankGroup

from ...engine_driver import Driver, engine_config, prompts

JUDGED = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0, logprobs=0)
# The median of a log-probability's error, as a multiple of what torch in bfloat16 is off.
OF_TORCH = 1.2
ROUNDED = 3.0  # with inputs of products in 8 bits, whose steps are twice to four times as large


def judged(engine: Engine) -> list[SampledToken]:
    """Return log-probabilities of long and short prompts in chunks and beside answers, and of what is said then."""
    driver, found = Driver(engine), list[SampledToken]()
    seqs = [driver.add(prompt, JUDGED) for prompt in prompts([5, 200, 70], 500)]
    for counts in ((5, 130, 0), (1, 70, 70), (1, 1, 1)):
        rows = [(seq, count) for seq, count in zip(seqs, counts, strict=True) if count]
        for (seq, _), tokens in zip(rows, driver.step(rows), strict=True):
            found += tokens
            if tokens:
                seq.token_ids[-1] = 7  # whatever nearly ties
        found += [entry for row in driver.outputs[-1].rows for entry in row.prompt_logprobs]
    return found


def native_engine(model_dir: Path, **fields: object) -> Engine:
    """Make an engine in C++, in bfloat16 unless it is told otherwise."""
    engine = Engine(engine_config(model_dir, **({"dtype": "bfloat16"} | fields)), num_blocks=64)
    assert isinstance(engine.runner, NativeRunner)
    return engine


def of_torch(model_dir: Path, **fields: object) -> list[SampledToken]:
    """Return what an engine in torch judges."""
    return judged(Engine(engine_config(model_dir, **fields), num_blocks=64, native=False))


@cache
def expected_of(model_dir: Path, quantization: str | None = None) -> list[SampledToken]:
    """Return what float32 judges, which is not rounded."""
    return of_torch(model_dir, dtype="float32", quantization=quantization)


def judged_by_ranks(config: EngineConfig) -> list[SampledToken]:
    """Return what several ranks in C++ judge."""
    group = RankGroup.start(config, num_blocks=64)
    try:
        engine = Engine(config, tp_size=config.tensor_parallel_size, num_blocks=64, group=group)
        assert isinstance(engine.runner, NativeRunner)
        return judged(engine)
    finally:
        group.close()


def error_of(found: list[SampledToken], expected: list[SampledToken]) -> float:
    """Return the median of how far log-probabilities are apart, of the tokens that both judge."""
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one.token_id == other.token_id]
    assert len(pairs) > 0.95 * len(expected) > 250  # what is said may nearly tie
    errors = [abs(one.logprob - other.logprob) for one, other in pairs if one.logprob and other.logprob]
    return median(errors)


@cache
def tolerance_of(model_dir: Path, factor: float = OF_TORCH) -> float:
    """Return how far a log-probability may be off (`error_of`), by what torch in bfloat16 is off."""
    return factor * error_of(of_torch(model_dir, dtype="bfloat16"), expected_of(model_dir))
