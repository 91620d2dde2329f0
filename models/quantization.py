"""A quantized model's matrices: which tensors of a checkpoint each is made of, and its form in memory.

    config.json's quantization_config, or --quantization  ->  Quantization  ->  Storage of a module  ->  tensors, Form

What is said here is known without torch; `engine/weights/formats.py` unpacks the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..common.errors import ConfigError
from .families.module_names import matches
from .parts.experts import GATES

Shape = tuple[int, ...]
Layout = Literal["plain", "integers", "packed", "float8", "gptq", "awq", "gguf"]
Sharing = Literal["tensor", "group", "block"]  # what has a scale of its own

AT_LOAD = ("int8", "int4", "fp8")  # what `--quantization` rounds a plain checkpoint to
TIED_HEAD = "model.embed_tokens"  # the name of a head that is the embedding's matrix
MXFP4_GROUP = 32  # inputs that share a scale
# Rows of a step that a GPU multiplies by nibbles as they are; more are multiplied by widened numbers. Of 4096 x 4096 on
# an RTX A6000 both took the same then (torchao's README of HQQ, "tinygemm" and "hqq_ref"); not measured here. A faster
# widening, or memory that is faster beside the multipliers, asks for less.
CARD_ROWS = 128
FLOAT8_CAPABILITY = (9, 0)  # of GPUs whose products of 8-bit floats take a scale for each row and each column
CARD_OUTPUTS = 8  # of which a GPU's product of nibbles takes multiples
_CARD_GROUPS = (32, 256)  # the least inputs of a group that it takes, and the most
_INT4_GROUP = 128  # of `--quantization int4`: what most checkpoints of 4 bits have; smaller ones are better and larger


class Form(NamedTuple):
    """The form of a matrix in memory: whole numbers with a scale, maybe a minimum, for each group of inputs."""

    bits: int
    group_size: int
    has_minima: bool

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        scales = (2 if self.has_minima else 1) * num_inputs // self.group_size
        return num_outputs * (num_inputs * self.bits // 8 + 4 * scales)

    @property
    def card_group(self) -> int:
        """Return the inputs of a group as a GPU multiplies by it; 0: it multiplies by widened numbers alone.

        Larger groups are several of the same scale.
        """
        size = math.gcd(self.group_size, _CARD_GROUPS[1])
        return size if size >= _CARD_GROUPS[0] else 0

    def card_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Count a matrix as a GPU multiplies by it: of 8 bits as if of twice the inputs in 4, and groups have zeros."""
        halves = self.bits // 4
        results = 0 if self.has_minima or self.group_size < num_inputs else 4
        return num_outputs * (halves * (num_inputs // 2 + 4 * num_inputs // self.card_group) + results)


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
    "Q4_K": GgufKind(256, 144, Form(4, 32, has_minima=True)),
    "Q5_K": GgufKind(256, 176, Form(8, 32, has_minima=True)),
    "Q6_K": GgufKind(256, 210, Form(8, 16, has_minima=False)),
}


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
    kind: str = ""  # GGUF's; of plain ones "float8": what they are rounded to at load

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
        else:
            group_size = self.group_size or num_inputs
            if self.layout == "plain" and self.bits == 4:
                group_size = math.gcd(_INT4_GROUP, num_inputs)
            form = Form(self.bits, group_size, not self.symmetric)
        if num_inputs % group_size or (self.bits == 4 and group_size % 2):
            raise ConfigError(f"{name}: its {num_inputs} inputs are no whole groups of {group_size}")
        return form

    def tensors(self, name: str, num_outputs: int, num_inputs: int) -> dict[str, Shape]:
        """Return the tensors of a matrix that a checkpoint must have."""
        in_words, out_words = (-(-size * self.bits // 32) for size in (num_inputs, num_outputs))
        num_groups = num_inputs // (self.group_size or num_inputs)
        of_groups = {"qzeros": (num_groups, out_words), "scales": (num_groups, num_outputs)}
        shapes: dict[str, Shape]
        match self.layout:
            case "gptq":
                shapes = {"qweight": (in_words, num_outputs), **of_groups}
            case "awq":
                shapes = {"qweight": (num_inputs, out_words), **of_groups}
            case "packed":
                shapes = {"weight_packed": (num_outputs, in_words), "weight_scale": (num_outputs, num_groups)}
                if not self.symmetric:
                    shapes["weight_zero_point"] = (out_words, num_groups)
            case "gguf":
                kind = GGUF_KINDS[self.kind]
                shapes = {"weight": (num_outputs, num_inputs // kind.size * kind.num_bytes)}
            case "plain":
                shapes = {"weight": (num_outputs, num_inputs)}
            case _:
                scales = self._shape_of_scales(num_outputs, num_inputs)
                shapes = {"weight": (num_outputs, num_inputs), self.scale_name: scales}
                if not self.symmetric:
                    shapes["weight_zero_point"] = scales
        return {f"{name}.{suffix}": shape for suffix, shape in shapes.items()}

    def _shape_of_scales(self, num_outputs: int, num_inputs: int) -> Shape:
        if self.sharing == "tensor":
            return (1,)
        if self.sharing == "block":
            return (-(-num_outputs // self.block[0]), -(-num_inputs // self.block[1]))
        return (num_outputs, num_inputs // (self.group_size or num_inputs))

    def optional_tensors(self, name: str, num_outputs: int, num_inputs: int) -> dict[str, Shape]:
        """Return the tensors of a matrix that a checkpoint may have. Scales of inputs are not used: each token's are
        taken from the token.
        """
        suffixes: dict[Layout, dict[str, Shape]] = {
            "gptq": {"g_idx": (num_inputs,), "bias": (num_outputs,)},
            "packed": {"weight_shape": (2,), "weight_g_idx": (num_inputs,)},
            "integers": {"input_scale": (1,), "input_zero_point": (1,)},
            "float8": {"input_scale": (1,), "activation_scale": (1,)},
        }
        return {f"{name}.{suffix}": shape for suffix, shape in suffixes.get(self.layout, {}).items()}


@dataclass(slots=True, frozen=True)
class Rule:
    """The storage of the modules that a target names; None: plain numbers."""

    # "Linear": every one but a gate; "re:" and an expression; a module's name, or some parts of it in a row.
    target: str
    storage: Storage | None
    is_nested: bool = False  # the language model is a part of a larger one, and names may say so

    @property
    def is_name(self) -> bool:
        return self.target != "Linear" and not self.target.startswith("re:")

    def names(self, module: str) -> bool:
        if self.target.startswith("re:"):
            return matches(self.target.removeprefix("re:"), module, is_nested=self.is_nested)
        if self.target == "Linear":  # tools leave gates plain without a word: many libraries have no linear there
            return not module.endswith(GATES)
        return f".{self.target}." in f".{module}."


class RuleIndex:
    """An index finds the first rule that names a module by looking up parts of its name: a mixture of experts has tens
    of thousands of modules, and its config.json may exclude hundreds by their names.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._others = [(place, rule) for place, rule in enumerate(rules) if not rule.is_name]
        # Of rules that are names; of one name the first.
        self._places = {rule.target: place for place, rule in reversed([*enumerate(rules)]) if rule.is_name}
        self._sizes = sorted({name.count(".") + 1 for name in self._places})  # parts of these names

    def first(self, module: str) -> Rule | None:
        """Return the first rule that names the module; None: no rule does."""
        parts = module.split(".")
        runs = (".".join(parts[at : at + size]) for size in self._sizes for at in range(len(parts) - size + 1))
        first = min((self._places[run] for run in runs if run in self._places), default=len(self._rules))
        other = next((place for place, rule in self._others if place < first and rule.names(module)), first)
        return self._rules[other] if other < len(self._rules) else None


@dataclass(slots=True, frozen=True, kw_only=True)
class Quantization:
    """A `Quantization` says how a model's matrices are stored. Tokens are looked up in plain numbers."""

    name: str  # what users are told
    method: str
    rules: tuple[Rule, ...] = ()  # of linears and an own head; the first that names a module holds
    modules: Mapping[str, Storage] = field(default_factory=dict, hash=False)  # before the rules; a tied head's too
    has_mxfp4_experts: bool = False  # stacks of them are in this format, by the names of their tensors
    widened_experts: tuple[str, ...] = ()  # kinds of blocks without code here: widened when a file was unpacked
    _index: RuleIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", RuleIndex(self.rules))

    def storage(self, module: str) -> Storage | None:
        """Return how the checkpoint has a linear's matrix; None: plainly."""
        if module in self.modules or module == TIED_HEAD:
            return self.modules.get(module)
        rule = self._index.first(module)
        return None if rule is None else rule.storage

    def form(self, modules: Iterable[str], num_inputs: int) -> Form | None:
        """Return the form of the matrix that these are fused into; None: plain numbers.

        Parts of several forms get one that holds each exactly: the most bits, the smallest groups. One plain part
        makes all plain. Raises ConfigError where groups do not fit.
        """
        storages = [(module, self.storage(module)) for module in modules]
        found = [None if kept is None else kept.form(module, num_inputs) for module, kept in storages]
        forms = [form for form in found if form is not None]
        if len(forms) < len(found):
            return None
        sizes = math.gcd(*(form.group_size for form in forms))
        return Form(max(form.bits for form in forms), sizes, any(form.has_minima for form in forms))

    def has_float8(self, modules: Iterable[str]) -> bool:
        """Tell whether all parts of the matrix that these are fused into are 8-bit floats, stored or once loaded."""
        return all(kept is not None and kept.is_float8 for kept in map(self.storage, modules))

    def rounds_to_float8(self, modules: Iterable[str]) -> bool:
        """Tell whether the matrix that these are fused into is rounded to 8-bit floats while it is loaded."""
        storages = map(self.storage, modules)
        return all(kept is not None and kept.layout == "plain" and kept.is_float8 for kept in storages)

    @property
    def is_rounded_float8(self) -> bool:
        return self.is_float8 and all(rule.storage is None or rule.storage.layout == "plain" for rule in self.rules)

    @property
    def is_float8(self) -> bool:
        return any(rule.storage is not None and rule.storage.is_float8 for rule in self.rules)

    def check_float8(self, *, has_products: bool, is_float32: bool) -> None:
        """Refuse to round to 8-bit floats for what does not multiply by them. Raises ConfigError."""
        if self.is_rounded_float8 and not has_products:
            major, minor = FLOAT8_CAPABILITY
            raise ConfigError(
                f"quantization = fp8: only GPUs of capability {major}.{minor} or more multiply by 8-bit floats; "
                "use int8 or int4, which CPUs and other GPUs have too"
            )
        if self.is_rounded_float8 and is_float32:
            raise ConfigError("quantization = fp8: its products are of bfloat16; give --dtype bfloat16")


def quantized_at_load(name: str) -> Quantization:
    """Return what `--quantization` int8, int4 or fp8 makes of a plain checkpoint.

    With whole numbers the head has 8 bits either way: small models live in it. With floats it is plain, as on every
    GPU; so is what makes heads of latents.
    """
    if name == "fp8":
        rules = [
            *(Rule(module, None) for module in ("lm_head", "kv_b_proj")),
            Rule("Linear", Storage(layout="plain", kind="float8")),
        ]
        return Quantization(name=name, method=name, rules=tuple(rules))
    head = Storage(layout="plain", bits=8)
    linear = Storage(layout="plain", bits=8 if name == "int8" else 4)
    return Quantization(
        name=name, method=name, rules=(Rule("lm_head", head), Rule("Linear", linear)), modules={TIED_HEAD: head}
    )


def chosen_quantization(stored: Quantization | None, asked: str | None) -> Quantization | None:
    """Return what is served: the checkpoint's own, or what `--quantization` makes of a plain one.

    Raises ConfigError where the two do not go together.
    """
    if asked is None or (stored is not None and stored.method == asked):
        return stored
    if stored is not None:
        raise ConfigError(f"quantization = {asked}: the checkpoint is {stored.name} already; leave it away")
    if asked in AT_LOAD:
        return quantized_at_load(asked)
    raise ConfigError(f"quantization = {asked}: the checkpoint's config.json has no such quantization_config")
