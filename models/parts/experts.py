"""A mixture of experts, as config.json tells it: how many there are, how a token's are chosen, how they are stored.

    scores = softmax or sigmoid (gate x)  ->  the best `num_chosen` of the best groups  ->  their weighted sum

`families.experts.ExpertTraits` says how families differ, `ExpertsConfig` what one checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...common.config import EngineConfig
from ...common.errors import ConfigError
from ..families.experts import ExpertTraits, Scoring, Stacks
from .config_fields import ConfigFields
from .expert_plan import ExpertPlan, read_plan
from .expert_stacks import Block, StackedExperts, StackPart

Shape = tuple[int, ...]

# Where experts are beside an MLP: of what they see, of what it yields, of what they yield.
NORMS_BESIDE_MLP = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "moe_k", "moe_topk")
_FIRST_SPARSE = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_BY_LAYER = (
    "moe_topk",
    "moe_intermediate_size",
    "num_experts",
)  # Hunyuan lists a number for each layer
_METHODS = (None, "greedy", "group_limited_greedy", "noaux_tc")
_SCORINGS = {"softmax": "softmax", "sigmoid": "sigmoid", "noaux_tc": "sigmoid"}  # the last one is dots.llm1's word


class Narrowing(NamedTuple):
    """Routed experts see narrower rows than the residual stream's: `ExpertTraits.narrowing`."""

    size: int  # numbers of a row
    before: str  # the names in a layer
    behind: str


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertsConfig:
    """The experts of each sparse layer, of the whole model."""

    num_experts: int
    num_chosen: int  # of them by a token
    intermediate_size: int  # of one
    module: str
    parts: tuple[str, ...]
    scoring: Scoring
    normalised: bool  # the chosen ones' weights add up to `scale`
    scale: float = 1.0  # of all weights
    num_groups: int = 1  # of neighbours
    num_chosen_groups: int = 1
    shared_size: int = 0  # inner columns of what every token takes besides; 0: none
    shared: str = "mlp.shared_experts"  # in a layer
    shared_parts: tuple[str, ...] = ExpertTraits().shared_parts
    shared_fused: str | None = None
    shared_gate: str | None = None  # in a layer: `ExpertTraits.shared_gate`; None: what it yields is taken as it is
    narrowing: Narrowing | None = None
    gate_name: str = "gate"
    scales_inputs: bool = False
    are_beside_mlp: bool = False
    is_stacked: bool = False
    stacks: Stacks | None = None
    score_bias: str | None = None  # its name in a layer: `ExpertTraits.score_bias`
    alpha: float = 1.702  # of the gate within the stacked ones' sigmoid
    limit: float = 7.0  # of what their gate and up yield

    @property
    def gate(self) -> str:
        return _joined(self.module, self.gate_name)

    def expert(self, index: int) -> str:
        """Return the name of an expert in its layer."""
        return _joined(self.module, f"experts.{index}")

    def shared_counts(self, *, whole_experts: bool) -> dict[str, int]:
        """Return what ranks share of them, by its name in config.json."""
        counts = (
            {"num_experts": self.num_experts} if whole_experts else {"moe_intermediate_size": self.intermediate_size}
        )
        return counts | ({"n_shared_experts * moe_intermediate_size": self.shared_size} if self.shared_size else {})

    def shapes(self, layer: str, hidden_size: int) -> dict[str, Shape]:
        """Return the tensors of a sparse layer, by their names in a checkpoint."""
        shapes: dict[str, Shape] = {f"{layer}.{self.gate}.weight": (self.num_experts, hidden_size)}
        if self.are_beside_mlp:
            shapes |= {f"{layer}.router.scale": (hidden_size,), f"{layer}.router.per_expert_scale": (self.num_experts,)}
            shapes |= {f"{layer}.{norm}.weight": (hidden_size,) for norm in NORMS_BESIDE_MLP}
        if self.score_bias is not None:
            shapes[f"{layer}.{self.score_bias}"] = (self.num_experts,)
        if self.shared_gate is not None:
            shapes[f"{layer}.{self.shared_gate}.weight"] = (1, hidden_size)
        if self.is_stacked:
            return shapes | self._stacked_shapes(layer, hidden_size)
        row_size = hidden_size
        if self.narrowing is not None:
            row_size, before, behind = self.narrowing
            shapes[f"{layer}.{before}.weight"] = (row_size, hidden_size)
            shapes[f"{layer}.{behind}.weight"] = (hidden_size, row_size)
        for index in range(self.num_experts):
            shapes |= _mlp_shapes(f"{layer}.{self.expert(index)}", self.parts, self.intermediate_size, row_size)
        if self.shared_size:
            name = f"{layer}.{self.shared}"
            shapes |= _mlp_shapes(name, self.shared_parts, self.shared_size, hidden_size, self.shared_fused)
        return shapes

    def parts_in(
        self, shapes: Mapping[str, Shape], hidden_size: int, block_of: Callable[[str], Block | None]
    ) -> dict[str, list[StackPart]]:
        """Return what each expert has of those tensors that stand for all of a layer, as `StackedExperts` does."""
        if self.stacks is None:
            return {}
        experts = StackedExperts(self.stacks, self.parts, self.expert, self.intermediate_size, hidden_size, block_of)
        return experts.parts_in(shapes)

    def _stacked_shapes(self, layer: str, hidden: int) -> dict[str, Shape]:
        n, inner, name = self.num_experts, self.intermediate_size, f"{layer}.{self.module}.experts"
        return {
            f"{layer}.{self.gate}.bias": (n,),
            f"{name}.gate_up_proj": (n, hidden, 2 * inner),
            f"{name}.gate_up_proj_bias": (n, 2 * inner),
            f"{name}.down_proj": (n, inner, hidden),
            f"{name}.down_proj_bias": (n, hidden),
        }


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _mlp_shapes(
    name: str, parts: tuple[str, ...], size: int, hidden_size: int, fused: str | None = None
) -> dict[str, Shape]:
    *before, down = parts
    sizes = dict.fromkeys(before, size) if fused is None else {fused: 2 * size}
    shapes: dict[str, Shape] = {f"{name}.{part}.weight": (outputs, hidden_size) for part, outputs in sizes.items()}
    return shapes | {f"{name}.{down}.weight": (hidden_size, size)}


def read_experts(fields: ConfigFields, traits: ExpertTraits | None) -> ExpertsConfig | None:
    """Return the experts of a family that has some; None: all of its layers are dense. Raises ConfigError."""
    if traits is None or _has_none(fields, traits):
        return None
    alike = {key: value[0] for key in _BY_LAYER if isinstance(value := fields.raw.get(key), list) and _is_one(value)}
    fields = ConfigFields(fields.path, {**fields.raw, **alike})  # other lists are refused where they are read
    if fields.has("scoring_func") and _SCORINGS.get(str(fields.raw["scoring_func"])) != traits.scoring:
        raise fields.refuse("scoring_func", f"experts of this family are scored by {traits.scoring}")
    num_experts, num_chosen = (fields.count(fields.told(keys)) for keys in (_COUNTS, _CHOSEN_COUNTS))
    size = fields.count("moe_intermediate_size", fields.count("intermediate_size"))
    num_groups, num_chosen_groups = _groups(fields, traits)
    if num_experts % num_groups:
        raise fields.refuse("n_group", f"must divide the {num_experts} experts")
    if num_chosen > num_experts // num_groups * num_chosen_groups:
        raise fields.refuse("num_experts_per_tok", "is more than there are to choose from")
    if fields.number("moe_layer_freq", 1.0) != 1.0:
        raise fields.refuse("moe_layer_freq", "only sparse layers side by side are supported")
    normalised = traits.normalised
    if normalised is None:
        normalised = fields.flag("norm_topk_prob", default=traits.normalised_default)
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=size,
        module=traits.module,
        parts=traits.parts,
        gate_name=traits.gate,
        scales_inputs=traits.scales_inputs,
        are_beside_mlp=traits.are_beside_mlp,
        is_stacked=traits.is_stacked,
        stacks=traits.stacks,
        score_bias=None if traits.score_bias is None else f"{traits.module}.{traits.score_bias}",
        alpha=fields.number("swiglu_alpha", 1.702),
        limit=fields.number("swiglu_limit", 7.0),
        scoring=traits.scoring,
        normalised=normalised,
        scale=1.0 if traits.scale is None else fields.number("routed_scaling_factor", traits.scale),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        shared_size=_shared_size(fields, traits, size),
        shared=traits.shared if traits.shared_is_beside else f"{traits.module}.{traits.shared}",
        shared_parts=traits.shared_parts,
        shared_fused=traits.shared_fused,
        narrowing=_narrowing(fields, traits),
        shared_gate=None if traits.shared_gate is None else f"{traits.module}.{traits.shared_gate}",
    )


def _groups(fields: ConfigFields, traits: ExpertTraits) -> tuple[int, int]:
    """Count the groups of experts, and those that a token's are of: one, where groups count for nothing."""
    if (method := fields.raw.get("topk_method")) not in _METHODS:
        raise fields.refuse("topk_method", f"is not supported; these are: {', '.join(map(str, _METHODS[1:]))}")
    if traits.groups is None or (traits.may_be_greedy and method in (None, "greedy")):
        return 1, 1
    count = fields.count("n_group", traits.groups[0])
    if count > 1 and traits.has_own_groups:
        raise fields.refuse("n_group", "groups of experts are not supported in this family")
    return count, min(fields.count("topk_group", traits.groups[1]), count)


def _has_none(fields: ConfigFields, traits: ExpertTraits) -> bool:
    return traits.is_optional and fields.raw.get(fields.told(_COUNTS)) == 0


def _narrowing(fields: ConfigFields, traits: ExpertTraits) -> Narrowing | None:
    if traits.narrowing is None or not fields.has("moe_latent_size"):
        return None
    if fields.flag("mlp_bias", default=False):
        raise fields.refuse("moe_latent_size", "experts of narrower rows with biases (mlp_bias) are not supported")
    return Narrowing(fields.count("moe_latent_size"), *(f"{traits.module}.{name}" for name in traits.narrowing))


def _shared_size(fields: ConfigFields, traits: ExpertTraits, size: int) -> int:
    if traits.shared_size_key is not None:
        return fields.count(traits.shared_size_key)
    key = fields.told(_SHARED_COUNTS)
    return size * fields.count(key) if fields.raw.get(key) else 0


def _is_one(numbers: list[object]) -> bool:
    return bool(numbers) and all(number == numbers[0] for number in numbers)


def read_sparse_layers(fields: ConfigFields, traits: ExpertTraits | None) -> tuple[bool, ...]:
    """Return of each layer whether experts take the place of its gated MLP. Raises ConfigError."""
    num_layers = fields.count("num_hidden_layers")
    if traits is None or _has_none(fields, traits):
        return (False,) * num_layers
    step = fields.count("decoder_sparse_step", fields.count("moe_layer_interval", 1))
    if fields.has("mlp_layer_types"):
        return _typed_layers(fields, num_layers)
    key = fields.told(_FIRST_SPARSE)
    first, last = fields.raw.get(key, traits.first_dense), fields.raw.get("moe_layer_end_index", -1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(first, int) or first < 0:
        raise fields.refuse(key, "must be a number of layers")
    if not isinstance(last, int) or last < -1:
        raise fields.refuse("moe_layer_end_index", "must be the number of a layer, or -1 for the last one")
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise fields.refuse("mlp_only_layers", "must be a list of layers")
    end = num_layers if last == -1 else last + 1
    return tuple(first <= i < end and (i + 1) % step == 0 and i not in dense for i in range(num_layers))


def _typed_layers(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    types = fields.raw["mlp_layer_types"]
    known = ("dense", "sparse")
    if not isinstance(types, list) or len(types) != num_layers or not all(each in known for each in types):
        raise fields.refuse("mlp_layer_types", f"must name one of {known} for each of {num_layers} layers")
    return tuple(each == "sparse" for each in types)


def expert_plan(
    engine: EngineConfig, experts: ExpertsConfig | None, sparse_layers: Sequence[bool]
) -> ExpertPlan | None:
    """Return which experts a worker's ranks hold; None: a part of each, or there are none. Raises ConfigError."""
    check_exchange(engine)
    if not engine.enable_expert_parallel or experts is None:
        if engine.expert_plan is not None:
            raise ConfigError("expert_plan: needs a mixture of experts, and enable_expert_parallel")
        return None
    num_experts, num_ranks = experts.num_experts, engine.tensor_parallel_size
    plan = ExpertPlan(num_experts, num_ranks)
    if engine.expert_plan is not None:
        layers = [layer for layer, is_sparse in enumerate(sparse_layers) if is_sparse]
        plan = read_plan(engine.expert_plan, num_ranks=num_ranks, num_experts=num_experts, sparse_layers=layers)
    return replace(plan, is_exchanged=engine.exchanges_experts)


def check_exchange(engine: EngineConfig) -> None:
    """Refuse to exchange tokens where no rank has whole experts that another one lacks. Raises ConfigError."""
    if not engine.exchanges_experts:
        return
    if not engine.enable_expert_parallel:
        raise ConfigError(f"expert_exchange: {engine.expert_exchange} needs enable_expert_parallel")
    if engine.tensor_parallel_size == 1:
        raise ConfigError(
            f"expert_exchange: {engine.expert_exchange} needs a tensor_parallel_size above 1; a pool may have its own: "
            "prefill.expert_exchange, decode.expert_exchange"
        )
