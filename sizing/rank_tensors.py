"""A rank's part of each tensor of a model, as a rank builds it (engine/nn).

outputs   a rank's part of them; fused parts (q, k and v; gate and up) are one matrix of one form
inputs    a rank's part of `o_proj`'s and `down_proj`'s
whole     norms, and biases that are added behind a sum over the ranks; a shared expert, where tokens are exchanged
states    of layers that keep one, what the sizes of a rank's states say (models/parts/states.py)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

from ..models.checkpoint import tensor_shapes
from ..models.config import ModelConfig
from ..models.quantization import LAYER_TABLE

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_TABLES = (EMBEDDING, LAYER_TABLE, HEAD)
_FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("kv_a_proj_with_mqa", "q_a_proj")),
    *(("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)
_WHOLE = ("kv_a_proj_with_mqa", "q_a_proj", "fc1_latent_proj", "fc2_latent_proj", "per_layer_model_projection")
_BY_INPUTS = ("o_proj", "out_proj", "down_proj", "w2", "per_layer_projection")
_GATES = (".gate.", ".router.", ".shared_expert_gate.")  # of experts: float32, and whole on every rank
# Of layers with states, float32 as well: engine/nn/convolution.py.
_CONVOLUTIONS = tuple(f"{name}.{part}" for name in (".conv1d", ".conv.conv") for part in ("weight", "bias"))
_OF_STATES = (*_CONVOLUTIONS, ".A_log", ".D", ".dt_bias", ".mamba.norm.weight", ".mixer.norm.weight")
_BY_HEADS = ("q_norm", "k_norm", "sinks")  # vectors of which a rank has its heads' part, where they are of all heads


class Matrix(NamedTuple):
    """A rank's part of one matrix."""

    modules: tuple[str, ...]  # the checkpoint's, which are fused into it
    num_outputs: int
    num_inputs: int
    num_parts: int = 1  # ranks that share each output's inputs


def is_expert(name: str) -> bool:
    """Tell whether a tensor is a routed expert's."""
    return ".experts." in name


def is_shared(name: str) -> bool:
    """Tell whether a tensor is a shared expert's."""
    return ".shared_expert" in name or ".shared_mlp." in name


def makes_heads(matrix: Matrix) -> bool:
    """Tell whether it makes heads of latents: plain numbers, however they are stored; on a CPU tiles of each head."""
    return any(module.endswith(".kv_b_proj") for module in matrix.modules)


def _is_gate(name: str) -> bool:
    return any(gate in name for gate in _GATES)


class RankTensors:
    """Tells what one of a model's ranks has of each tensor."""

    def __init__(
        self, model: ModelConfig, num_ranks: int, held: Mapping[int, Collection[int]], *, is_exchanged: bool
    ) -> None:
        """`held`: by layer the experts of a rank with whole ones; empty: it has a part of each. `is_exchanged`: rows of
        experts are.
        """
        self._model, self._num_ranks, self._is_exchanged = model, num_ranks, is_exchanged
        self._held = {f"model.layers.{layer}": own for layer, own in held.items()}
        name = "" if model.states is None else model.states.module  # others of Nemotron-H's layers have that name too
        with_states = filter(model.has_state, range(model.num_layers))
        self._of_states = tuple(f"model.layers.{layer}.{name}." for layer in with_states)
        self._num_copies = 1 if model.latent is not None else max(1, num_ranks // model.num_kv_heads)  # of KV heads
        own = model if model.states is None else replace(model, states=model.states.of_rank(num_ranks))
        self._shapes = tensor_shapes(own)  # as a rank has them of layers with states, whole ones of others

    @property
    def num_vector_values(self) -> int:
        """Count the numbers of vectors, but for those in float32."""
        return sum(self._rank_size(name, shape[0]) for name, shape in self._shapes.items() if len(shape) == 1)

    @property
    def num_state_values(self) -> int:
        """Count the numbers in float32 that layers with states compute by."""
        return sum(math.prod(shape) for name, shape in self._shapes.items() if name.endswith(_OF_STATES))

    @property
    def gates(self) -> list[tuple[int, ...]]:
        """List the shapes of experts' gates, in float32."""
        return [shape for name, shape in self._shapes.items() if _is_gate(name)]

    def _rank_size(self, name: str, size: int) -> int:
        """Return the numbers of a vector that a rank has; 0 of those in float32, which are counted by themselves."""
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if _is_gate(name) or name.endswith(_OF_STATES):
            return 0
        is_split = (name.endswith(".bias") and module not in (*_BY_INPUTS, *_WHOLE)) or (
            module in _BY_HEADS and (module == "sinks" or self._model.family.head_norms == "whole")
        )
        is_own = is_split and not self._is_of_states(name)
        return self._with_copies(module, size) // self._num_ranks if is_own else size

    def _with_copies(self, module: str, num_outputs: int) -> int:
        """Count a module's outputs on all ranks: those that make keys and values as often as ranks have a head."""
        model, last = self._model, module.rpartition(".")[2]
        kept = {"k_proj": num_outputs, "v_proj": num_outputs, "qkv_proj": 2 * model.num_kv_heads * model.head_dim}
        return num_outputs + kept.get(last, 0) * (self._num_copies - 1)

    def _is_of_states(self, name: str) -> bool:
        return name.startswith(self._of_states)

    def matrices(self) -> Iterator[Matrix]:
        """Yield the layers' matrices, fused parts as one."""
        shapes = {name.removesuffix(".weight"): size for name, size in self._shapes.items()}
        experts = self._model.experts
        held = self._held
        for module, shape in shapes.items():
            path, _, last = module.rpartition(".")
            if experts is not None and experts.is_stacked and is_expert(module):
                yield from self._stacked(module, shape, len(held[_layer(module)]) if held else None)
                continue
            if len(shape) != 2 or module in _TABLES or _is_gate(f"{module}."):
                continue
            whole = self._fused(shapes, path, last)
            if whole is None:
                continue  # counted with its first part
            if self._is_of_states(module):
                yield whole._replace(num_parts=self._num_ranks if last in _BY_INPUTS else 1)
            elif held and is_expert(module):
                if int(path.rpartition(".")[2]) in held[_layer(module)]:
                    yield whole
            elif self._is_exchanged and is_shared(module):
                yield whole
            elif last in _BY_INPUTS:
                yield whole._replace(num_inputs=whole.num_inputs // self._num_ranks, num_parts=self._num_ranks)
            elif last in _WHOLE:
                yield whole
            else:
                num_outputs = sum(self._with_copies(each, shapes[each][0]) for each in whole.modules)
                yield whole._replace(num_outputs=num_outputs // self._num_ranks)

    def _stacked(self, module: str, shape: tuple[int, ...], num_own: int | None) -> Iterator[Matrix]:
        """Yield each expert's matrix of a stack [experts, inputs, outputs], or the stack of their biases."""
        if len(shape) == 2:
            yield Matrix((module,), shape[0] // self._num_ranks, shape[1])
            return
        count, num_inputs, num_outputs = shape
        if num_own is not None:
            count = num_own
        elif module.endswith("down_proj"):
            num_inputs //= self._num_ranks
        else:
            num_outputs //= self._num_ranks
        yield from repeat(Matrix((module,), num_outputs, num_inputs), count)

    @staticmethod
    def _fused(shapes: Mapping[str, tuple[int, ...]], path: str, last: str) -> Matrix | None:
        """Return the whole matrix that begins with this part; None: it begins with another one."""
        fused = next((parts for parts in _FUSED if last in parts), (last,))
        parts = [part for part in fused if f"{path}.{part}" in shapes]
        if last != parts[0]:
            return None
        modules = tuple(f"{path}.{part}" for part in parts)
        return Matrix(modules, sum(shapes[module][0] for module in modules), shapes[modules[0]][1])


def _layer(module: str) -> str:
    return ".".join(module.split(".")[:3])
