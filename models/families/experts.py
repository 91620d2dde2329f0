"""Families' experts differ in how a token's are chosen, and in how a checkpoint names them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Scoring = Literal["softmax", "sigmoid"]


class Stacks(NamedTuple):
    """A sparse layer's experts are stored in two tensors for all: gates before ups, and downs."""

    gate_up: str = "mlp.experts.gate_up_proj"  # its name in a layer
    down: str = "mlp.experts.down_proj"


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertTraits:
    """A family's experts, as far as its table tells of them."""

    module: str = "mlp"  # of a sparse layer
    is_optional: bool = False  # where config.json tells of 0 experts, all layers are dense
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # names of an expert's matrices; of two: no gate
    scoring: Scoring = "softmax"
    normalised: bool | None = None  # None: as `norm_topk_prob` says
    normalised_default: bool = False
    # Of all weights, where config.json has no `routed_scaling_factor`; None: what it has there is not read.
    scale: float | None = None
    scales_inputs: bool = False  # what experts see is multiplied by their weights, not what they yield
    # Of neighbours, and those that a token's experts are of, where config.json has no `n_group` and no `topk_group`;
    # None: what it has there is not read.
    groups: tuple[int, int] | None = None
    has_own_groups: bool = False  # they are chosen otherwise than others' are: more than one is refused
    may_be_greedy: bool = False  # groups count for nothing unless `topk_method` says how
    first_dense: int = 0  # layers, where config.json tells none
    gate: str = "gate"
    is_stacked: bool = False  # one tensor for all experts, with biases, in gpt-oss's form; the gate has one, too
    stacks: Stacks | None = None  # None: a tensor for each matrix
    # What moves scores for the choice alone, not for the weights (DeepSeek-V3, section 2.1.2), by its name in `module`.
    score_bias: str | None = None
    shared: str = "shared_experts"  # what every token takes besides, in `module`
    shared_is_beside: bool = False  # it is in the layer
    shared_parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared_fused: str | None = None  # a tensor of its gate and up
    shared_size_key: str | None = None  # of its inner columns in config.json; None: it is as large as so many experts
    # What makes a token's row narrower before the routed experts, and their sum as wide as it was, in `module`;
    # config.json tells how narrow, or that they see it as it is.
    narrowing: tuple[str, str] | None = None
    # A layer has its MLP besides: experts see rows by a norm of their own, and their sum is normed and added to its.
    are_beside_mlp: bool = False
    shared_gate: str | None = None  # a vector in `module`, whose sigmoid with a token is the shared one's weight

    @property
    def gates(self) -> tuple[str, ...]:
        """Return the names in a layer of what is small and decides much: it is never rounded by `--quantization`."""
        gates = (self.gate,) if self.shared_gate is None else (self.gate, self.shared_gate)
        return tuple(f"{self.module}.{gate}" if self.module else gate for gate in gates)


QWEN3_VL = ExpertTraits(normalised=True, stacks=Stacks())
GRANITE = ExpertTraits(
    module="block_sparse_moe",
    gate="router.layer",
    normalised=True,
    stacks=Stacks("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
GRANITE_HYBRID = replace(
    GRANITE,
    is_optional=True,
    shared="shared_mlp",
    shared_is_beside=True,
    shared_parts=("gate_proj", "up_proj", "output_linear"),
    shared_fused="input_linear",
    shared_size_key="shared_intermediate_size",
)
LFM2_EXPERTS = ExpertTraits(
    module="feed_forward",
    parts=("w1", "w3", "w2"),
    scoring="sigmoid",
    normalised_default=True,
    scale=1.0,
    first_dense=2,
    score_bias="expert_bias",
)
HUNYUAN = ExpertTraits(gate="gate.wg", shared="shared_mlp", normalised=True)
LLAMA_4 = ExpertTraits(
    module="feed_forward",
    gate="router",
    scoring="sigmoid",
    normalised=False,
    scales_inputs=True,
    stacks=Stacks("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    shared="shared_expert",
    shared_size_key="intermediate_size",
)
GEMMA_4_EXPERTS = ExpertTraits(
    module="",
    is_optional=True,
    gate="router.proj",
    normalised=True,
    stacks=Stacks("experts.gate_up_proj", "experts.down_proj"),
    are_beside_mlp=True,
)
DEEPSEEK_V2 = ExpertTraits(normalised=False, scale=1.0, groups=(1, 1), may_be_greedy=True)
MISTRAL_4 = ExpertTraits(normalised_default=True, scale=1.0, groups=(1, 1), has_own_groups=True, stacks=Stacks())
DEEPSEEK_V3 = ExpertTraits(
    scoring="sigmoid",
    normalised_default=True,
    scale=2.5,
    groups=(8, 4),
    first_dense=3,
    score_bias="gate.e_score_correction_bias",
)
ERNIE = ExpertTraits(normalised=True, first_dense=1, score_bias="moe_statics.e_score_correction_bias")
GLM_4 = replace(DEEPSEEK_V3, scale=1.0, groups=(1, 1), first_dense=1)
GLM_4_LITE = replace(GLM_4, scale=1.8)
EXAONE = replace(GLM_4, scale=2.5, score_bias="e_score_correction_bias")
SOLAR = replace(GLM_4, first_dense=0)
DOTS_1 = replace(SOLAR, normalised_default=False)
NEMOTRON_H_EXPERTS = ExpertTraits(
    module="mixer",
    is_optional=True,
    parts=("up_proj", "down_proj"),
    scoring="sigmoid",
    normalised_default=True,
    scale=1.0,
    groups=(1, 1),
    score_bias="gate.e_score_correction_bias",
    shared_parts=("up_proj", "down_proj"),
    shared_size_key="moe_shared_expert_intermediate_size",
    narrowing=("fc1_latent_proj", "fc2_latent_proj"),
)
QWEN_NEXT_EXPERTS = ExpertTraits(
    normalised_default=True,
    shared="shared_expert",
    shared_size_key="shared_expert_intermediate_size",
    shared_gate="shared_expert_gate",
)
QWEN3_5_EXPERTS = replace(QWEN_NEXT_EXPERTS, normalised=True, stacks=Stacks())
MIXTRAL = ExpertTraits(module="block_sparse_moe", parts=("w1", "w3", "w2"), normalised=True)
MINIMAX_M2 = replace(MIXTRAL, scoring="sigmoid", score_bias="e_score_correction_bias")
