"""Counts a rank's weights tensor by tensor, as a rank builds them (engine/nn) and as a CPU packs them (engine/cpu).

    rows of the vocabulary   embedding and head: as many on every rank, the last one's padded
    layers                   what a rank has of each tensor (`rank_tensors.py`)
    tiles                    on a CPU: columns in 64s, inputs in 32s, scales in as few bytes as say the same

Pure: what a checkpoint holds comes from its config.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..common.config import EngineConfig
from ..models.config import ModelConfig
from ..models.native import not_in_native
from ..models.parts.experts import expert_plan
from ..models.parts.gpu_attention import weights_dtype
from ..models.quantization import FLOAT8_MULTIPLE, KEPT_GROUP, TIED_HEAD, Quantization, chosen_quantization
from ..models.storage import CARD_OUTPUTS, MXFP4_GROUP, Form
from .rank_tensors import HEAD, Matrix, RankTensors, is_expert, is_shared, makes_heads
from .scales import scale_bytes

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
_TILE_OUTPUTS, _TILE_INPUTS = 64, 32  # of a CPU's tiles: engine/cpu/native/machine/tiles.hpp
_GROUP_UNIT = 8  # inputs to which a group is padded there: engine/cpu/native/products/integer_tiles.hpp

# Bytes that are moved for a number, by its bits, where a GPU widens it and multiplies by it (`engine/cuda/int4.py`):
# signs and halves are set apart (7), scaled (4) and, of 8 bits, both halves added (6), then read (2).
_WIDENING = {4: 13, 8: 30}


class WeightBytes(NamedTuple):
    """Bytes of one rank's weights."""

    total: int
    read: int  # by a decode step of many rows: not the rows that tokens are looked up in, but where they are the head
    experts: int  # routed ones
    nibbles: int = 0  # of those that are read, what a GPU multiplies few rows by
    widened: int = 0  # moved, in place of these, by a step of more rows
    rounded: int = 0  # numbers that a GPU multiplies many rows by in whole numbers of 8 bits


def item_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Return the bytes of a weight. A device that is still `auto` counts as a CPU."""
    return ITEM_BYTES[weights_dtype(engine, model, is_cuda=engine.device == "cuda")]


def lacks_native(engine: EngineConfig, model: ModelConfig) -> list[str]:
    """Name each part of the model, as this engine serves it on a CPU, that there is no C++ for: torch computes it then.

    Raises ConfigError for a quantization that does not go with the checkpoint.
    """
    quantization = chosen_quantization(model.quantization, engine.quantization)
    return _lacking(engine, model, quantization, engine.tensor_parallel_size)


def _lacking(engine: EngineConfig, model: ModelConfig, quantization: Quantization | None, num_ranks: int) -> list[str]:
    return not_in_native(
        model,
        quantization,
        is_float32=item_bytes(engine, model) == ITEM_BYTES["float32"],
        is_exchanged=engine.exchanges_experts and num_ranks > 1,
        num_ranks=num_ranks,
    )


class WeightCounter:
    """Counts one rank's weights of one model."""

    def __init__(
        self,
        engine: EngineConfig,
        model: ModelConfig,
        quantization: Quantization | None,
        num_ranks: int,
        *,
        has_float8: bool = False,
        groups_float8: bool = False,
    ) -> None:
        """`has_float8`: its GPU multiplies by 8-bit floats; `groups_float8`: by those of many experts at once."""
        self._engine, self._model, self._num_ranks = engine, model, num_ranks
        self._item_bytes = item_bytes(engine, model)
        self._on_gpu = engine.device == "cuda"
        self._is_exchanged = engine.exchanges_experts and num_ranks > 1
        self._has_tiles = not (self._on_gpu or _lacking(engine, model, quantization, num_ranks))
        self._quantization = quantization if self._on_gpu or self._has_tiles else None
        self._widened = quantization if self._quantization is None else None  # by torch, when it is loaded
        is_bfloat16 = self._item_bytes == ITEM_BYTES["bfloat16"]
        self._has_float8 = (
            self._on_gpu
            and is_bfloat16
            and (has_float8 or (quantization is not None and quantization.is_rounded_float8))
        )
        self._groups_float8 = self._on_gpu and is_bfloat16 and groups_float8
        plan = expert_plan(engine, model.experts, model.sparse_layers) if num_ranks > 1 else None
        # Of a rank with whole experts, these, by number of the layer; of the one that holds most.
        self._held = plan.fullest(model.sparse_layers) if plan is not None else {}
        self._tensors = RankTensors(model, num_ranks, self._held, is_exchanged=self._is_exchanged)

    def count(self) -> WeightBytes:
        model = self._model
        embedding = self._vocabulary_rows * model.hidden_size * self._item_bytes
        shares_head = model.tie_embeddings and self._on_gpu  # a CPU packs a tied one a second time
        head = 0 if not model.has_head else embedding if shares_head else self._head_bytes()
        sizes = [(matrix, self._matrix_bytes(matrix)) for matrix in self._tensors.matrices()]
        read = sum(size for _, size in sizes) + self._vector_bytes()
        read += head
        experts = sum(size for matrix, size in sizes if is_expert(matrix.modules[0]))
        integers = [(own, size, form) for own, size in sizes if (form := self._integers(own)) is not None]
        nibbles = [(own, size, form) for own, size, form in integers if _are_nibbles(own, form)]
        return WeightBytes(
            total=read - head + (embedding if shares_head else head + embedding) + self._input_table_bytes(),
            read=read,
            experts=experts,
            nibbles=sum(size for _, size, _ in nibbles),
            widened=sum(own.num_outputs * own.num_inputs * _WIDENING[form.bits] for own, _, form in nibbles),
            rounded=sum(own.num_outputs * own.num_inputs for own, _, form in integers if _rounds_rows(own, form)),
        )

    def adapted_sizes(self) -> int:
        """Sum the inputs and the outputs of all linears that an adapter may change: of each part its own inputs."""
        left_out = (is_expert, is_shared) if self._is_exchanged else (is_expert,)
        own = (each for each in self._tensors.matrices() if not makes_heads(each))
        adapted = [each for each in own if not any(is_one(each.modules[0]) for is_one in left_out)]
        return sum(len(matrix.modules) * matrix.num_inputs + matrix.num_outputs for matrix in adapted)

    def adapted_expert_sizes(self) -> int:
        """Sum the inputs and the outputs of a rank's experts, as `adapted_sizes` does of the other linears."""
        own = [each for each in self._tensors.matrices() if is_expert(each.modules[0]) and not self._are_stacked]
        return sum(len(matrix.modules) * matrix.num_inputs + matrix.num_outputs for matrix in own)

    @property
    def _are_stacked(self) -> bool:
        """Tell whether experts stand in one tensor, which no adapter adapts."""
        return self._model.experts is not None and self._model.experts.is_stacked

    @property
    def _vocabulary_rows(self) -> int:
        return -(-self._model.vocab_size // self._num_ranks)

    def _input_table_bytes(self) -> int:
        """Count what is looked up in besides the embedding."""
        if (inputs := self._model.layer_inputs) is None:
            return 0
        return -(-inputs.vocab_size // self._num_ranks) * self._model.num_layers * inputs.size * self._item_bytes

    def _head_bytes(self) -> int:
        name = TIED_HEAD if self._model.tie_embeddings else HEAD
        matrix = Matrix((name,), self._vocabulary_rows, self._model.hidden_size)
        return self._plain_bytes(matrix) if self._on_gpu else self._matrix_bytes(matrix)

    def _vector_bytes(self) -> int:
        tensors = self._tensors
        gates = sum(map(self._gate_bytes, tensors.gates))
        # C++ has those of states in another order beside.
        of_states = tensors.num_state_values * ITEM_BYTES["float32"] * (2 if self._has_tiles else 1)
        return tensors.num_vector_values * self._item_bytes + gates + of_states

    def _gate_bytes(self, shape: tuple[int, ...]) -> int:
        if self._has_tiles and len(shape) == 2 and shape[0] > 1:  # one output is in no tiles
            return self._plain_bytes(Matrix((), *shape))
        return math.prod(shape) * ITEM_BYTES["float32"]

    def _matrix_bytes(self, matrix: Matrix) -> int:
        if self._are_stacked and is_expert(matrix.modules[0]):
            return self._stacked_bytes(matrix)
        if makes_heads(matrix):
            return self._plain_bytes(matrix)
        if self._quantization is None:
            if self._widened is not None:
                _form(self._widened, matrix)  # torch loads it by ranks all the same
            return self._plain_bytes(matrix)
        if (form := self._kept_float8(matrix)) is not None:
            return form.num_bytes(matrix.num_outputs, matrix.num_inputs)
        form = _form(self._quantization, matrix)
        if form is None and self._has_float8 and self._quantization.has_float8(matrix.modules):
            return matrix.num_outputs * (matrix.num_inputs + 4)  # a float32 for each output
        if form is None:
            return self._plain_bytes(matrix)
        if self._on_gpu:
            are_nibbles = self._integers(matrix) is not None and _are_nibbles(matrix, form)
            count = form.card_bytes if are_nibbles else form.num_bytes
            return count(matrix.num_outputs, matrix.num_inputs)
        num_groups = matrix.num_inputs // form.group_size
        numbers = num_groups * _padded(form.group_size, _GROUP_UNIT) * form.bits // 8
        scales = num_groups * (2 if form.has_minima else 1) * self._scale_bytes(matrix.modules[0], form)
        return round(_padded(matrix.num_outputs, _TILE_OUTPUTS) * (numbers + scales))

    @property
    def _card_quantization(self) -> Quantization | None:
        """Return the quantization where a GPU multiplies by numbers in their own bits; None: nothing does."""
        return self._quantization if self._on_gpu and self._item_bytes == ITEM_BYTES["bfloat16"] else None

    def _kept_float8(self, matrix: Matrix) -> Form | None:
        """Return the form of a matrix whose 8-bit floats a GPU keeps as they are stored; None: it has another."""
        if (quantization := self._card_quantization) is None:
            return None
        return quantization.kept_float8(matrix.modules, matrix.num_inputs, has_products=self._has_float8)

    def _integers(self, matrix: Matrix) -> Form | None:
        """Return the form of a matrix that is multiplied by alone, in sizes that a GPU's products of integers take."""
        if (quantization := self._card_quantization) is None:
            return None
        experts = self._model.experts
        is_together = experts is not None and (experts.is_stacked or not self._is_exchanged)  # widened in registers
        if (is_together and is_expert(matrix.modules[0])) or makes_heads(matrix):
            return None
        form = _form(quantization, matrix)
        is_taken = form is not None and not (form.is_e2m1 or form.is_e4m3) and matrix.num_outputs % CARD_OUTPUTS == 0
        return form if is_taken else None

    def _stacked_bytes(self, matrix: Matrix) -> int:
        """Count an expert's of a stack: as a checkpoint in MXFP4 has it, where every rank has whole groups.

        A GPU that is asked to has it as 8-bit floats, if it multiplies by many such matrices at once.
        """
        experts, quantization = self._model.experts, self._quantization
        assert experts is not None
        own = experts.intermediate_size // (1 if self._held else self._num_ranks)
        is_mxfp4 = quantization is not None and quantization.has_mxfp4_experts
        is_float8 = quantization is not None and quantization.rounds_experts_of_mxfp4
        if matrix.modules[0].endswith("_bias"):
            return matrix.num_outputs * matrix.num_inputs * self._item_bytes
        are_taken = own % FLOAT8_MULTIPLE == self._model.hidden_size % FLOAT8_MULTIPLE == 0
        if is_float8 and self._groups_float8 and are_taken:
            return matrix.num_outputs * (matrix.num_inputs + 4)  # a float32 for each output
        is_kept = self._has_tiles or (self._on_gpu and self._item_bytes == ITEM_BYTES["bfloat16"])
        if not is_mxfp4 or not is_kept or own % MXFP4_GROUP:
            return self._plain_bytes(matrix)
        num_groups = matrix.num_inputs // MXFP4_GROUP  # each of 4 bits a number, and a byte
        num_outputs = _padded(matrix.num_outputs, _TILE_OUTPUTS) if self._has_tiles else matrix.num_outputs
        return num_outputs * num_groups * (MXFP4_GROUP // 2 + 1)

    def _plain_bytes(self, matrix: Matrix) -> int:
        outputs, inputs, latent = matrix.num_outputs, matrix.num_inputs, self._model.latent
        if self._has_tiles and latent is not None and makes_heads(matrix):
            both = (latent.kv_rank, latent.nope_dim), (latent.value_dim, latent.kv_rank)
            of_head = sum(self._plain_bytes(Matrix((), *shape)) for shape in both)
            return outputs // (latent.nope_dim + latent.value_dim) * of_head
        if self._has_tiles:
            outputs, inputs = _padded(outputs, _TILE_OUTPUTS), _padded(inputs, _TILE_INPUTS)
        return outputs * inputs * self._item_bytes

    def _scale_bytes(self, module: str, form: Form) -> float:
        assert self._quantization is not None
        is_short = self._model.dtype == "bfloat16" and self._engine.load_format != "dummy"
        return scale_bytes(self._quantization.storage(module), form, is_short=is_short)


def _rounds_rows(matrix: Matrix, form: Form) -> bool:
    """Tell whether a GPU multiplies many rows by it in whole numbers of 8 bits (`engine/cuda/int8.py`)."""
    return form == Form(8, matrix.num_inputs, has_minima=False) and matrix.num_inputs % KEPT_GROUP == 0


def _are_nibbles(matrix: Matrix, form: Form) -> bool:
    """Tell whether a GPU multiplies by it as nibbles (`engine/cuda/int4.py`)."""
    return form.card_group > 0 and not _rounds_rows(matrix, form)


def _form(quantization: Quantization, matrix: Matrix) -> Form | None:
    """Return the form of a rank's part; None: plain numbers. Raises ConfigError where that is no whole groups."""
    form = quantization.form(matrix.modules, matrix.num_inputs * matrix.num_parts)
    return None if form is None else form.of_rank(matrix.modules[0], matrix.num_inputs, matrix.num_parts)


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
