"""A layer's blocks are chosen here, and nowhere else.

    mixer           `mixer.py`         tokens meet the tokens before them
    feed-forward    `feed_forward.py`  each token by itself
    weight          `engine/weights/`  the matrix of a product; `Builder.weight` chooses

A new kind of block is a class that implements its protocol, and a line here that chooses it by the model's config.
Loading, packing and torch's runners, exact ones too, take it as it is. C++ runs models of the kinds that it knows
(`engine/cpu/model.py`), torch all others; CUDA's fused steps (`engine/cuda/decoder.py`) know the kinds of today.
"""

from __future__ import annotations

from collections.abc import Callable

from ...models.parts.delta_nets import DeltaNetsConfig
from ...models.parts.mamba import MambaConfig
from ...models.parts.short_convolutions import ShortConvolutionsConfig
from ...models.parts.states import StatesConfig
from .builder import Builder
from .convolution import ShortConvolution
from .delta_net import GatedDeltaNet
from .exchange import ExchangedMLP
from .experts import SparseMLP
from .feed_forward import FeedForward, make_mlp
from .latent import LatentAttention
from .mamba import Mamba
from .mixer import Attention, GatedAttention, Mixer, NormedValueAttention, SideBySide, StatefulMixer
from .residual import ExpertsBeside
from .states import LayerStates

_STATEFUL: dict[type[StatesConfig], Callable[[Builder, str, int, LayerStates], StatefulMixer]] = {
    DeltaNetsConfig: GatedDeltaNet,
    MambaConfig: Mamba,
    ShortConvolutionsConfig: ShortConvolution,
}


def make_mixer(builder: Builder, layer: str, layer_id: int) -> Mixer:
    """Make the mixer of layer `layer_id`, which has one, and whose tensors' names begin with `layer`."""
    config, name = builder.config, f"{layer}.{builder.config.family.attention}"
    stateful: StatefulMixer | None = None
    if config.has_state(layer_id):
        assert builder.states is not None
        states = builder.states.config
        index = sum(states.layers[:layer_id])
        stateful = _STATEFUL[type(states)](builder, f"{layer}.{states.module}", index, builder.states)
    if (page := config.page_of(layer_id)) is None:
        assert stateful is not None
        return stateful
    if stateful is not None:
        return SideBySide(builder, Attention(builder, name, page), stateful)
    if config.latent is not None:
        return LatentAttention(builder, name, page, config.latent)
    if config.uneven is not None:
        heads, made = config.heads_of(layer_id), config.uneven.made(layer_id)
        return NormedValueAttention(builder, name, page, heads=heads, made=made)
    make = GatedAttention if config.family.has_attention_gates else Attention
    return make(builder, name, page)


def make_feed_forward(builder: Builder, layer: str, layer_id: int) -> FeedForward:
    config = builder.config
    if not config.has_mlp(layer_id):
        return _make_experts(builder, layer, layer_id)
    family, size = config.family, config.inner_size(layer_id)
    own = family.mlp
    fused = None if family.fusion == "none" else own.fused
    return make_mlp(builder, f"{layer}.{own.module}", size, own.parts, fused=fused)


def make_experts_beside(builder: Builder, layer: str, layer_id: int) -> ExpertsBeside | None:
    """Make what a layer has beside its MLP; None: nothing."""
    if not builder.config.has_mlp(layer_id) or builder.config.experts_of(layer_id) is None:
        return None
    return ExpertsBeside(builder, layer, _make_experts(builder, layer, layer_id))


def _make_experts(builder: Builder, layer: str, layer_id: int) -> SparseMLP:
    experts = builder.config.experts_of(layer_id)
    assert experts is not None
    if (plan := builder.expert_plan) is None:
        return SparseMLP(builder, layer, experts)
    make = ExchangedMLP if plan.is_exchanged else SparseMLP
    return make(builder, layer, experts, plan.held(layer_id))
