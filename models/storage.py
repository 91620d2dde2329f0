"""A `Storage` says how one matrix of a quantized model stands in its checkpoint, a `Form` how it does in memory.

    Storage  layout, bits, groups  ->  the tensors that a checkpoint must have  ->  Form

What is said here is known without torch; `engine/weights/formats.py` unpacks the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..common.errors import ConfigError

Shape = tuple[int, ...]
Types = tuple[str, ...]  # of a tensor's numbers, as safetensors' headers name them
Layout = Literal["plain", "integers", "packed", "float8", "float4", "gptq", "awq", "gguf"]
Sharing = Literal["tensor", "group", "block"]  # what has a scale of its own

FLOATS: Types = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
BYTES: Types = ("U8",)
_WORDS: Types = ("I32",)
_WHOLE: Types = ("I8", "U8", "I16", "I32", "I64")
_INDICES: Types = ("I32", "I64")
MXFP4_GROUP = 32  # inputs that share a scale
CARD_OUTPUTS = 8  # of which a GPU's product of nibbles takes multiples
_CARD_GROUPS = (32, 256)  # the least inputs of a group that it takes, and the most
_INT4_GROUP = 128  # of `--quantization int4`: what most checkpoints of 4 bits have; smaller ones are better and larger


# How many ranks a worker has may be told for all workers, or for those of one pool.
_POOLS_OWN = "by its pool's own flag (--prefill-tensor-parallel-size, --decode-tensor-parallel-size)"
FEWER_RANKS = f"give a worker fewer ranks, by --tensor-parallel-size or {_POOLS_OWN}"


class Form(NamedTuple):
    """The form of a matrix in memory: small numbers with a scale, maybe a minimum, for each group of inputs."""

    bits: int
    group_size: int
    has_minima: bool
    is_e2m1: bool = False  # each of 4 bits is a float: sign, exponent of 2 and a binary place
    is_e4m3: bool = False  # each of 8 bits is a float

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        scales = (2 if self.has_minima else 1) * num_inputs // self.group_size
        return num_outputs * (num_inputs * self.bits // 8 + 4 * scales)

    def of_rank(self, name: str, num_inputs: int, num_ranks: int) -> Form:
        """Return the form of a rank's part, of `num_inputs`, where so many share them: whole rows stay one group.

        Raises ConfigError where the part is no whole groups.
        """
        if self.group_size == num_inputs * num_ranks:
            return self._replace(group_size=num_inputs)
        if num_inputs % self.group_size:
            raise ConfigError(
                f"{name}: a rank's {num_inputs} inputs of {num_inputs * num_ranks} are no whole groups "
                f"of {self.group_size}; {FEWER_RANKS}"
            )
        return self

    @property
    def card_group(self) -> int:
        """Return the inputs of a group as a GPU multiplies by it; 0: it multiplies by widened numbers alone.

        Larger groups are several of the same scale.
        """
        if self.is_e2m1 or self.is_e4m3:
            return 0
        size = math.gcd(self.group_size, _CARD_GROUPS[1])
        return size if size >= _CARD_GROUPS[0] else 0

    def card_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Count a matrix as a GPU multiplies by it: of 8 bits as if of twice the inputs in 4, and groups have zeros."""
        halves = self.bits // 4
        results = 0 if self.has_minima or self.group_size < num_inputs else 4
        return num_outputs * (halves * (num_inputs // 2 + 4 * num_inputs // self.card_group) + results)


class WantedTensor(NamedTuple):
    """Says what a tensor of a checkpoint must be."""

    shape: Shape
    types: Types = FLOATS


class GgufKind(NamedTuple):
    """A kind of GGUF's blocks."""

    size: int  # numbers of a block
    num_bytes: int  # of a block
    form: Form


GGUF_KINDS = {
    "Q4_0": GgufKind(32, 18, Form(4, 32, has_minima=False)),
    "Q4_1": GgufKind(32, 20, Form(4, 32, has_minima=True)),
    "Q5_0": GgufKind(32, 22, Form(8, 32, has_minima=False)),
    "Q5_1": GgufKind(32, 24, Form(8, 32, has_minima=True)),
    "Q8_0": GgufKind(32, 34, Form(8, 32, has_minima=False)),
    "Q2_K": GgufKind(256, 84, Form(4, 16, has_minima=True)),
    "Q3_K": GgufKind(256, 110, Form(4, 16, has_minima=False)),
    "Q4_K": GgufKind(256, 144, Form(4, 32, has_minima=True)),
    "Q5_K": GgufKind(256, 176, Form(8, 32, has_minima=True)),
    "Q6_K": GgufKind(256, 210, Form(8, 16, has_minima=False)),
    "IQ4_NL": GgufKind(32, 18, Form(8, 32, has_minima=False)),  # 4 bits choose one of 16 whole numbers of 8
    "IQ4_XS": GgufKind(256, 136, Form(8, 32, has_minima=False)),
    "MXFP4": GgufKind(MXFP4_GROUP, 17, Form(4, MXFP4_GROUP, has_minima=False, is_e2m1=True)),
}


class Float4Kind(NamedTuple):
    """A kind of matrices in 4-bit floats: which tensors they are made of."""

    group_size: int  # inputs that share a scale
    numbers: str  # the tensor of their bytes, an even input's number in the low half
    whole_scale: str = ""  # of all groups' scales, which are 8-bit floats then, else exponents of 2
    is_divisor: bool = False  # they are divided by it


FLOAT4_KINDS = {
    "mxfp4": Float4Kind(MXFP4_GROUP, "weight_packed"),
    "nvfp4": Float4Kind(16, "weight_packed", "weight_global_scale", is_divisor=True),
    "modelopt": Float4Kind(16, "weight", "weight_scale_2"),  # NVFP4, as Model Optimizer writes it
}


NO_SHARED_ACT_ORDER = (
    "weights in act-order cannot be shared by ranks: a rank's inputs belong to groups of all of them; "
    f"give a worker one rank, by --tensor-parallel-size 1 or {_POOLS_OWN}"
)
_GROUP_INDEX: dict[Layout, str] = {"gptq": "g_idx", "packed": "weight_g_idx"}


@dataclass(slots=True, frozen=True, kw_only=True)
class Storage:
    """A `Storage` says how one matrix stands in a checkpoint."""

    layout: Layout
    bits: int = 8
    group_size: int = 0  # inputs of a group; 0: all of them
    symmetric: bool = True
    sharing: Sharing = "group"
    block: tuple[int, int] = (0, 0)  # outputs and inputs that share a scale
    scale_name: str = "weight_scale"
    one_less: bool = False  # GPTQ: zeros are stored less one
    is_ordered: bool = False  # act-order: a tensor must say of each input which group it is of
    kind: str = ""  # GGUF's, or of 4-bit floats; of plain ones "float8": what they are rounded to at load

    @property
    def is_float8(self) -> bool:
        """Tell whether its numbers are 8-bit floats, in the checkpoint or once they are loaded."""
        return self.layout == "float8" or (self.layout == "plain" and self.kind == "float8")

    def form(self, name: str, num_inputs: int) -> Form | None:
        """Return the matrix's form in memory; None: plain numbers. Raises ConfigError where groups do not fit."""
        if self.is_float8:
            return None
        if self.layout == "gguf":
            group_size, _, form = GGUF_KINDS[self.kind]
        elif self.layout == "float4":
            group_size = FLOAT4_KINDS[self.kind].group_size
            form = Form(4, group_size, has_minima=False, is_e2m1=True)
        else:
            group_size = self.group_size or num_inputs
            if self.layout == "plain" and self.bits == 4:
                group_size = math.gcd(_INT4_GROUP, num_inputs)
            form = Form(self.bits, group_size, not self.symmetric)
        if num_inputs % group_size or (self.bits == 4 and group_size % 2):
            raise ConfigError(f"{name}: its {num_inputs} inputs are no whole groups of {group_size}")
        return form

    def tensors(self, name: str, num_outputs: int, num_inputs: int) -> dict[str, WantedTensor]:
        """Return the tensors of a matrix that a checkpoint must have. Raises ConfigError where groups do not fit."""
        self.form(name, num_inputs)
        in_words, out_words = (-(-size * self.bits // 32) for size in (num_inputs, num_outputs))
        num_groups = num_inputs // (self.group_size or num_inputs)
        of_groups = {
            "qzeros": WantedTensor((num_groups, out_words), _WORDS),
            "scales": WantedTensor((num_groups, num_outputs)),
        }
        tensors: dict[str, WantedTensor]
        match self.layout:
            case "gptq":
                tensors = {"qweight": WantedTensor((in_words, num_outputs), _WORDS), **of_groups}
            case "awq":
                tensors = {"qweight": WantedTensor((num_inputs, out_words), _WORDS), **of_groups}
            case "packed":
                tensors = {"weight_packed": WantedTensor((num_outputs, in_words), _WORDS)}
                tensors["weight_scale"] = WantedTensor((num_outputs, num_groups))
                if not self.symmetric:
                    tensors["weight_zero_point"] = WantedTensor((out_words, num_groups), _WORDS)
            case "gguf":
                kind = GGUF_KINDS[self.kind]
                tensors = {"weight": WantedTensor((num_outputs, num_inputs // kind.size * kind.num_bytes), BYTES)}
            case "float4":
                group_size, numbers, whole_scale, _ = FLOAT4_KINDS[self.kind]
                types = FLOATS if whole_scale else BYTES
                tensors = {numbers: WantedTensor((num_outputs, num_inputs // 2), BYTES)}
                tensors["weight_scale"] = WantedTensor((num_outputs, num_inputs // group_size), types)
                if whole_scale:
                    tensors[whole_scale] = WantedTensor((1,))
            case "plain":
                tensors = {"weight": WantedTensor((num_outputs, num_inputs))}
            case _:
                tensors = self._with_scales(num_outputs, num_inputs)
        named = {f"{name}.{suffix}": wanted for suffix, wanted in tensors.items()}
        if num_groups > 1 and (index := self.group_index(name)) is not None:
            named[index] = WantedTensor((num_inputs,), _INDICES)
        return named

    def _with_scales(self, num_outputs: int, num_inputs: int) -> dict[str, WantedTensor]:
        """Return the tensors of a matrix whose numbers stand in it one by one."""
        numbers, is_float = (num_outputs, num_inputs), self.layout == "float8"
        if self.sharing == "tensor":
            scales: Shape = (1,)
        elif self.sharing == "block":
            scales = (-(-num_outputs // self.block[0]), -(-num_inputs // self.block[1]))
        else:
            scales = (num_outputs, num_inputs // (self.group_size or num_inputs))
        tensors = {"weight": WantedTensor(numbers, ("F8_E4M3",) if is_float else ("I8",))}
        tensors[self.scale_name] = WantedTensor(scales, (*FLOATS, *BYTES) if is_float else FLOATS)
        if not self.symmetric:
            tensors["weight_zero_point"] = WantedTensor(scales, (*_WHOLE, *FLOATS))
        return tensors

    def group_index(self, name: str) -> str | None:
        """Return the name of the tensor that says of each input which group it is of; None: inputs stand in order."""
        return f"{name}.{_GROUP_INDEX[self.layout]}" if self.is_ordered else None

    def optional_tensors(self, name: str, num_outputs: int, num_inputs: int) -> dict[str, Shape]:
        """Return the tensors of a matrix that a checkpoint may have. Scales of inputs are not used: each token's are
        taken from the token.
        """
        suffixes: dict[Layout, dict[str, Shape]] = {
            "gptq": {"g_idx": (num_inputs,), "bias": (num_outputs,)},
            "packed": {"weight_shape": (2,), "weight_g_idx": (num_inputs,)},
            "integers": {"input_scale": (1,), "input_zero_point": (1,)},
            "float8": {"input_scale": (1,), "activation_scale": (1,)},
            "float4": {"input_scale": (1,), "input_global_scale": (1,)},
        }
        return {f"{name}.{suffix}": shape for suffix, shape in suffixes.get(self.layout, {}).items()}
