"""What a CPU takes for each part of a step (`sizing/cpu.py`), from two shapes that are no model's, each with few layers
and with more: what the layers between them take has nothing of embedding, head and Python in it.

    narrow, wide     other shares of weights and activations, heads of 64 and of 128
    decode rows      1 to 32, at hardly any context: products; 8 at a long one: the cache
    prompts          64 and 512 tokens: by many rows what a weight takes and what a value; 512 behind 1,024 others:
                     more by what pairs take, of the same products

The least of the rounds counts, as whatever else runs only takes away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.benchmarks.shared.plain_steps import decoding, least_ms, num_blocks_of, prefilling, timed
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.sizing.cpu_rates import CpuRates
from kvferry.sizing.work import count_params, num_values

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine  # which imports torch

_ROWS = (1, 2, 4, 8, 16, 32)
_SHORT, _LONG, _LONG_ROWS = 16, 1024, 8
_PROMPTS = (64, 512)
_MAX_TOKENS = 512  # of a step: each prompt is one
_BEHIND = 1024  # tokens of a prompt that are there already
_VOCAB = 16384
_COMMON: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _VOCAB,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SHAPES = {
    "narrow": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4},
    "wide": {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 4},
}
LAYERS = {"narrow": (2, 18), "wide": (1, 3)}  # of which the difference is many times a cache


@dataclass(slots=True, frozen=True)
class _Layer:
    """One layer of a shape: how much there is of each thing, and seconds by case."""

    weights: float
    values: float  # of a token
    heads: int
    head_dim: int
    token_bytes: int  # of the cache
    seconds: dict[str, float]


class Probe:
    """A `Probe` measures in as many sittings as wanted: of a machine whose speed changes, the quickest ones count."""

    def __init__(self, folder: Path, threads: int, tell: Callable[[str], None]) -> None:
        """The folder gets the shapes, and is empty before. torch has so many threads already."""
        self._folder = folder
        self._tell = tell
        self._runs: dict[str, Callable[[], float]] = {}
        self._sittings: list[Mapping[str, float]] = []  # milliseconds by case
        for name, shape in SHAPES.items():
            for layers in LAYERS[name]:
                tell(f"probe: {name}, {layers} layers")
                engine = _engine(folder / f"{name}-{layers}", shape, layers, threads)
                self._runs |= {f"{name}-{layers} {case}": timed(run) for case, run in _cases(engine).items()}

    def measure(self, rounds: int) -> None:
        """Take some seconds."""
        self._tell(f"probe: {rounds} rounds")
        self._sittings.append(least_ms(self._runs, rounds))

    def rates(self, sittings: int = 0) -> CpuRates:
        """Return what follows from so many last sittings, or from all. Raises ConfigError: the machine was too busy."""
        found = self._sittings[-sittings:]
        return rates_of({case: min(one[case] for one in found) for case in found[0]}, self._folder)


def rates_of(found_ms: Mapping[str, float], folder: Path) -> CpuRates:
    """Return the rates that follow from times by shape, number of layers and case."""
    narrow, wide = (_layer(folder, name, found_ms) for name in SHAPES)
    rates, layers = _rates(narrow, wide, 0.0), LAYERS["narrow"][0]
    head_s = rates.product_s(1) * _VOCAB * SHAPES["narrow"]["hidden_size"]
    step_s = found_ms[f"narrow-{layers} decode 1"] / 1e3 - layers * narrow.seconds["decode 1"] - head_s
    rates = _rates(narrow, wide, max(0.0, step_s))
    if not rates.check():
        raise ConfigError(f"the machine is too busy: {rates}")
    return rates


def write_shape(folder: Path, shape: dict[str, int], layers: int) -> Path:
    """Write a shape's config.json; return its folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**_COMMON, **shape, "num_hidden_layers": layers}), encoding="utf-8")
    return folder


def _engine(folder: Path, shape: dict[str, int], layers: int, threads: int) -> Engine:
    from kvferry.engine.engine import Engine

    config = EngineConfig(
        model_dir=write_shape(folder, shape, layers),
        served_model_name="probe",
        device="cpu",
        dtype="bfloat16",
        num_threads=threads,
        load_format="dummy",
        max_num_batched_tokens=_MAX_TOKENS,
    )
    return Engine(config, num_blocks=2 * num_blocks_of([(_LONG_ROWS, _LONG)], config.block_tokens))


def _cases(engine: Engine) -> dict[str, Callable[[], None]]:
    runs = {f"decode {rows}": decoding(engine, rows, _SHORT) for rows in _ROWS}
    runs["long"] = decoding(engine, _LONG_ROWS, _LONG)
    runs |= {f"prompt {tokens}": prefilling(engine, tokens) for tokens in _PROMPTS}
    return runs | {"behind": prefilling(engine, _MAX_TOKENS, _BEHIND)}


def _layer(folder: Path, name: str, found_ms: Mapping[str, float]) -> _Layer:
    few, many = LAYERS[name]
    model = ModelConfig.from_dir(folder / f"{name}-{few}")
    cases = [case.partition(" ")[2] for case in found_ms if case.startswith(f"{name}-{few} ")]
    seconds = {
        case: (found_ms[f"{name}-{many} {case}"] - found_ms[f"{name}-{few} {case}"]) / 1e3 / (many - few)
        for case in cases
    }
    return _Layer(
        weights=count_params(model).layers / few,
        values=num_values(model) / few,
        heads=model.num_qo_heads,
        head_dim=model.head_dim,
        token_bytes=4 * model.num_kv_heads * model.head_dim,
        seconds=seconds,
    )


def _rates(narrow: _Layer, wide: _Layer, step_s: float) -> CpuRates:
    scores = [
        (layer.seconds["behind"] - layer.seconds[f"prompt {_MAX_TOKENS}"]) / (_MAX_TOKENS * _BEHIND * layer.heads)
        for layer in (narrow, wide)
    ]
    item_s = max(0.0, (scores[1] - scores[0]) / (wide.head_dim - narrow.head_dim))
    score_s = max(0.0, scores[0] - item_s * narrow.head_dim)

    def linear_s(layer: _Layer, tokens: int) -> float:
        """Return what a prompt takes without its pairs."""
        pairs = tokens * (tokens + 1) // 2
        return layer.seconds[f"prompt {tokens}"] - pairs * layer.heads * (score_s + item_s * layer.head_dim)

    one, other = (linear_s(layer, _MAX_TOKENS) / _MAX_TOKENS for layer in (narrow, wide))
    value_s = (one * wide.weights - other * narrow.weights) / (
        narrow.values * wide.weights - wide.values * narrow.weights
    )
    value_s = max(0.0, value_s)
    # Of one row: each shape's weights, and what a layer takes beside them and the values.
    near, far = (layer.seconds["decode 1"] - layer.values * value_s for layer in (narrow, wide))
    layer_s = max(0.0, near - (far - near) / (wide.weights - narrow.weights) * narrow.weights)

    def product_s(tokens: int, seconds: float) -> float:
        return (seconds - layer_s - tokens * wide.values * value_s) / wide.weights

    cached = sum(layer.seconds["long"] - layer.seconds[f"decode {_LONG_ROWS}"] for layer in (narrow, wide))
    num_bytes = _LONG_ROWS * (_LONG - _SHORT) * (narrow.token_bytes + wide.token_bytes)
    products = [(rows, product_s(rows, wide.seconds[f"decode {rows}"])) for rows in _ROWS]
    products += [(tokens, product_s(tokens, linear_s(wide, tokens))) for tokens in _PROMPTS]
    for index in range(len(products) - 1, 0, -1):  # more rows take no less: a time that does was disturbed
        products[index - 1] = products[index - 1][0], min(products[index - 1][1], products[index][1])
    return CpuRates(
        products=tuple(products),
        value_s=value_s,
        score_s=score_s,
        score_item_s=item_s,
        cache_byte_s=max(0.0, cached / num_bytes),
        step_s=step_s,
        layer_s=layer_s,
    )
