"""A step-time model of a live worker: what its heartbeats said of its steps, fitted.

    {"samples": [[step_s, prefill_tokens, prefill_pairs, decode_rows, decode_context], ...]}

Errors count relative to a step's time: a short step matters as much as a long one. No price is below zero, since more
work never takes less time; a step that some other process of the machine has stretched is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ...common.errors import ConfigError
from ...sizing.steps import Linear
from ...wire.workers import StepSample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Kind = TypeVar("Kind")
_NUM_PRICES = 6
_OUTLIER = 3.0  # times the middle deviation
_LEAST_STEP_S = 1e-9  # no step is shorter, and what is divided by one is finite


class _File(msgspec.Struct):
    samples: list[StepSample]


def read_samples(path: Path) -> list[StepSample]:
    return read_json("steps", path, _File).samples


def read_json(name: str, path: Path, kind: type[Kind]) -> Kind:
    """Read a file that a flag of this name gives. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{name}: {path}: {error}") from error


def fit(samples: Sequence[StepSample], *, noise: bool = True) -> Linear:
    """`noise`: also how far steps lie from the fit."""
    import numpy as np

    usable = [
        sample for sample in samples if sample.step_s >= _LEAST_STEP_S and (sample.prefill_tokens or sample.decode_rows)
    ]
    if len(usable) < 2 * _NUM_PRICES:
        raise ConfigError(f"{len(usable)} samples of steps are too few to fit {_NUM_PRICES} prices to")
    times = np.array([sample.step_s for sample in usable])
    rows = np.array([_features(sample) for sample in usable]) / times[:, None]
    prices = _least_squares(rows)
    errors = rows @ prices - 1
    kept = np.abs(errors) <= max(_OUTLIER * float(np.median(np.abs(errors))), 1e-9)
    prices = _least_squares(rows[kept])
    spread = float(np.std(rows[kept] @ prices - 1))
    model = Linear(*(float(price) for price in prices))
    return replace(model, noise=spread) if noise else model


def _features(sample: StepSample) -> tuple[float, ...]:
    """Return a sample's features in the order of `Linear`'s fields."""
    return (
        1.0,
        float(sample.prefill_tokens > 0),
        sample.prefill_tokens,
        sample.prefill_pairs,
        sample.decode_rows,
        sample.decode_context,
    )


def _least_squares(rows: Floats) -> Floats:
    """Prices with which each row comes closest to 1, none of them negative: the most negative one goes, and again."""
    import numpy as np

    prices = np.zeros(rows.shape[1])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    used = list(range(rows.shape[1]))
    while used:
        found = np.linalg.lstsq(rows[:, used] / scale[used], np.ones(len(rows)), rcond=None)[0]
        if found.min() >= 0:
            prices[used] = found / scale[used]
            break
        del used[int(found.argmin())]
    return prices
