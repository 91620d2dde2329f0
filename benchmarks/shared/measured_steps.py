"""Step times of this machine's workers as a simulator's step model, from the samples that they told their router.

    samples ─> two fits (router/state/step_fit.py): steps with parts of prompts, and mere decode steps
            ─> what each fit misses at few or many tokens: the mean of measured / fitted in octaves of the step's size
            ─> spread of what is left: the model's noise

A CPU's step is no straight line in its rows: the second fit of each octave keeps what bends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import log
from statistics import fmean, pstdev

from kvferry.common.errors import ConfigError
from kvferry.router.state.step_fit import StepCosts, StepFit, step_s
from kvferry.sizing.steps import StepWork
from kvferry.wire.workers import StepSample

_MIN_IN_OCTAVE = 6
_MIN_SAMPLES = 8
_ENOUGH = 20  # of a kind, to leave the calibration out
_FAR_OFF = 3.0  # times longer or shorter than fitted: no step of this machine, but of what else ran on it


@dataclass(slots=True, frozen=True)
class Curve:
    """One kind of step."""

    costs: StepCosts
    octaves: tuple[float, ...]  # factor for steps of [1, 2), [2, 4), [4, 8), ... tokens
    noise: float
    num_samples: int

    def factor(self, num_tokens: int) -> float:
        return self.octaves[min(len(self.octaves) - 1, max(1, num_tokens).bit_length() - 1)]


@dataclass(slots=True, frozen=True)
class MeasuredSteps:
    """Implements `StepModel`."""

    prompts: Curve
    decodes: Curve
    noise: float

    def step_s(self, work: StepWork) -> float:
        curve = self.prompts if work.prefill_tokens else self.decodes
        seconds = curve.costs.step_s(
            tokens=work.prefill_tokens, pairs=work.prefill_pairs, rows=work.decode_rows, context=work.decode_context
        )
        return seconds * curve.factor(work.prefill_tokens or work.decode_rows)

    def run(self, rows: int, context: int) -> tuple[float, float]:
        factor, costs = self.decodes.factor(rows), self.decodes.costs
        return factor * costs.step_s(rows=rows, context=context), factor * rows * costs.context_s

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def fit_steps(samples: Iterable[StepSample], calibration: Iterable[StepSample] = ()) -> MeasuredSteps:
    """`calibration`: from the workers' start, when others started beside them; only where there is little else.

    Raises ConfigError where there is too little of a kind.
    """
    samples, calibration = list(samples), list(calibration)
    prompts = _curve("prompts", *(_of_prompts(some, True) for some in (samples, calibration)))
    decodes = _curve("decode steps", *(_of_prompts(some, False) for some in (samples, calibration)))
    return MeasuredSteps(prompts, decodes, noise=(prompts.noise + decodes.noise) / 2)


def _of_prompts(samples: Sequence[StepSample], wanted: bool) -> list[StepSample]:
    return [sample for sample in samples if (sample.prefill_tokens > 0) is wanted]


def _curve(what: str, seen: Sequence[StepSample], calibration: Sequence[StepSample]) -> Curve:
    samples = seen if len(seen) >= _ENOUGH else [*calibration, *seen]
    if len(samples) < _MIN_SAMPLES:
        raise ConfigError(f"{len(samples)} samples of {what}: at least {_MIN_SAMPLES} are needed")
    fit = StepFit()
    for sample in samples:
        fit.observe(sample)
    ratios = [(_octave(sample), sample.step_s / step_s(fit.costs, sample)) for sample in samples]
    near = [(octave, ratio) for octave, ratio in ratios if 1 / _FAR_OFF < ratio < _FAR_OFF]
    octaves = _means(near)
    noise = pstdev([log(ratio / octaves[octave]) for octave, ratio in near])
    return Curve(fit.costs, octaves, noise, len(samples))


def _octave(sample: StepSample) -> int:
    return (sample.prefill_tokens or sample.decode_rows).bit_length() - 1


def _means(ratios: Sequence[tuple[int, float]]) -> tuple[float, ...]:
    """Of each octave; where it has few samples, that of the one below."""
    found: list[float] = []
    for octave in range(max(octave for octave, _ in ratios) + 1):
        own = [ratio for number, ratio in ratios if number == octave]
        found.append(fmean(own) if len(own) >= _MIN_IN_OCTAVE else found[-1] if found else 1.0)
    return tuple(found)
