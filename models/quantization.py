"""A quantized model's matrices: which tensors of a checkpoint each is made of, and its form in memory.

    config.json's quantization_config, or --quantization  ->  Quantization  ->  Storage of a module  ->  tensors, Form

What one matrix's storage is: `storage.py`. What is said here is known without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..common.errors import ConfigError
from .families.lookup import GATES
from .families.module_names import matches
from .storage import Form, Storage

AT_LOAD = ("int8", "int4", "fp8")  # what `--quantization` rounds a plain checkpoint to
TIED_HEAD = "model.embed_tokens"  # the name of a head that is the embedding's matrix
LAYER_TABLE = "model.embed_tokens_per_layer"  # what each layer is given of a token is looked up there
# Rows of a step that a GPU multiplies by nibbles as they are; more are multiplied by widened numbers. Of 4096 x 4096 on
# an RTX A6000 both took the same then (torchao's README of HQQ, "tinygemm" and "hqq_ref"); not measured here. A faster
# widening, or memory that is faster beside the multipliers, asks for less.
CARD_ROWS = 128
FLOAT8_CAPABILITY = (9, 0)  # of GPUs whose products of 8-bit floats take a scale for each row and each column
FLOAT8_MULTIPLE = 16  # numbers: of which such products take rows and columns
_GATES = tuple(f".{gate}" for gate in GATES)
# Tensors of tools that quantize, and of no plain checkpoint.
_NOT_PLAIN = (
    ".qweight",
    ".scales",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
    "_blocks",
)
KEPT_GROUP = 16  # inputs: groups of multiples are multiplied by as they are (`engine/cuda/coded_kernel.py`)


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
            return not module.endswith(_GATES)
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
        if module in self.modules or module in (TIED_HEAD, LAYER_TABLE):
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
        sizes, bits = math.gcd(*(form.group_size for form in forms)), max(form.bits for form in forms)
        are_e2m1 = {form.is_e2m1 for form in forms}
        if len(are_e2m1) > 1:
            bits = 8  # twice such a float is a whole number
        return Form(bits, sizes, any(form.has_minima for form in forms), is_e2m1=are_e2m1 == {True})

    def block_of(self, module: str) -> tuple[int, int] | None:
        """Return the outputs and inputs of a linear that share a scale in the checkpoint; None: it has no blocks."""
        storage = self.storage(module)
        return storage.block if storage is not None and storage.sharing == "block" else None

    def has_float8(self, modules: Iterable[str]) -> bool:
        """Tell whether all parts of the matrix that these are fused into are 8-bit floats, stored or once loaded."""
        return all(kept is not None and kept.is_float8 for kept in map(self.storage, modules))

    def kept_float8(self, modules: Iterable[str], num_inputs: int, *, has_products: bool) -> Form | None:
        """Return the form of a rank's part of a matrix whose stored 8-bit floats a GPU keeps; None: it does not.

        Blocks of outputs and inputs become groups of inputs, as large as its `num_inputs` let them be. `has_products`:
        the GPU multiplies by 8-bit floats with a scale for each output, of which such a matrix is better made.
        """
        storages = [*map(self.storage, modules)]
        if not all(kept is not None and kept.layout == "float8" for kept in storages):
            return None
        widths = [kept.block[1] for kept in storages if kept is not None and kept.sharing == "block"]
        group_size = math.gcd(num_inputs, *widths)
        if group_size % KEPT_GROUP or (has_products and group_size == num_inputs):
            return None
        return Form(8, group_size, has_minima=False, is_e4m3=True)

    def rounds_to_float8(self, modules: Iterable[str]) -> bool:
        """Tell whether the matrix that these are fused into is rounded to 8-bit floats while it is loaded."""
        storages = map(self.storage, modules)
        return all(kept is not None and kept.layout == "plain" and kept.is_float8 for kept in storages)

    @property
    def is_ordered(self) -> bool:
        """Tell whether inputs of some matrix stand in act-order."""
        return any(rule.storage is not None and rule.storage.is_ordered for rule in self.rules)

    @property
    def is_rounded_float8(self) -> bool:
        return self.is_float8 and all(rule.storage is None or rule.storage.layout == "plain" for rule in self.rules)

    @property
    def rounds_experts_of_mxfp4(self) -> bool:
        """Tell whether stacks in MXFP4 become 8-bit floats, where a device multiplies by many such matrices at once."""
        return self.has_mxfp4_experts and self.is_rounded_float8

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


def untold_quantization(names: Iterable[str]) -> str:
    """Return what is to be told of weights that are not plain, by tensors' names, where config.json says nothing."""
    found = min((name for name in names if name.endswith(_NOT_PLAIN)), default=None)
    if found is None:
        return ""
    return (
        f"; {found} is of quantized weights, and config.json has no quantization_config that says how they are stored"
    )


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
    if stored is not None and stored.method == "mxfp4" and asked == "fp8":  # its experts; what is plain stays so
        rules = (Rule("experts", Storage(layout="plain", kind="float8")),)
        return replace(stored, name=asked, method=asked, rules=rules)
    if stored is not None:
        raise ConfigError(f"quantization = {asked}: the checkpoint is {stored.name} already; leave it away")
    if asked in AT_LOAD:
        return quantized_at_load(asked)
    raise ConfigError(f"quantization = {asked}: the checkpoint's config.json has no such quantization_config")
