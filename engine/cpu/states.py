"""Layers that keep a state as C++ takes them (`native/layers/model.hpp`): matrices packed, all else in float32."""

from __future__ import annotations

import math
from typing import TypedDict

import torch

from ..nn.convolution import Convolution, ShortConvolution
from ..nn.delta_net import GatedDeltaNet
from ..nn.mamba import Mamba
from .described import DELTA_NET, MAMBA, SHORT_CONVOLUTION, DeltaNetParts, MambaParts, StateParts
from .packing import address
from .weights import Weights

Stateful = GatedDeltaNet | Mamba | ShortConvolution


class _CommonParts(TypedDict):
    """Every kind of `StateParts` has these of its convolution and of its state."""

    convolution: int | None
    convolution_bias: int | None
    kernel_size: int
    num_convolved: int
    num_values: int
    memory_size: int


def _common_parts(weights: Weights, convolution: Convolution) -> _CommonParts:
    """Describe what all kinds have."""
    config = convolution.config
    by_token = convolution.weight.squeeze(1).T.contiguous()
    weights.keep.append(by_token)
    return {
        "convolution": address(by_token),
        "convolution_bias": address(convolution.bias),
        "kernel_size": config.kernel_size,
        "num_convolved": config.num_convolved,
        "num_values": config.num_values,
        "memory_size": math.prod(config.memory_shape),
    }


def describe(weights: Weights, mixer: Stateful, inputs: float) -> StateParts:
    """Describe it, as its kind is. `inputs`: what the mixer's are multiplied by, if it stands beside attention."""
    if isinstance(mixer, Mamba):
        return _mamba(weights, mixer, inputs)
    assert inputs == 1.0
    return _delta_net(weights, mixer) if isinstance(mixer, GatedDeltaNet) else _convolution(weights, mixer)


def _convolution(weights: Weights, mixer: ShortConvolution) -> StateParts:
    described = StateParts(kind=SHORT_CONVOLUTION, **_common_parts(weights, mixer.convolution))
    weights.place(described.rows, mixer.in_proj, mixer.in_proj.bias)
    return described


def _delta_net(weights: Weights, net: GatedDeltaNet) -> DeltaNetParts:
    config, vectors = net.config, net.vectors.by_name
    forgetting = vectors["A_log"].exp()
    weights.keep.append(forgetting)
    described = DeltaNetParts(
        kind=DELTA_NET,
        num_rates=net.rates_proj.weight.num_outputs,
        forgetting=address(forgetting),
        rate_bias=address(vectors["dt_bias"]),
        norm=address(net.norm.weight),
        num_key_heads=config.num_key_heads,
        num_value_heads=config.num_value_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        is_grouped=config.is_grouped,
        norm_eps=net.norm.eps,
        **_common_parts(weights, net.convolution),
    )
    weights.place(described.rows, net.rows_proj, None)
    weights.place(described.rates, net.rates_proj, None)
    return described


def _mamba(weights: Weights, mixer: Mamba, inputs: float) -> MambaParts:
    config, vectors, bias, factors = mixer.config, mixer.vectors.by_name, mixer.in_proj.bias, mixer.factors
    forgetting = vectors["A_log"].exp()
    if inputs != 1.0:  # of products in place of what is multiplied
        factors = inputs * (torch.ones(mixer.in_proj.weight.num_outputs) if factors is None else factors)
        bias = None if bias is None else bias / inputs
    weights.keep += [forgetting, factors]
    described = MambaParts(
        kind=MAMBA,
        factors=address(factors),
        num_rates=config.num_heads,
        forgetting=address(forgetting),
        step_bias=address(vectors["dt_bias"]),
        kept=address(vectors["D"]),
        norm=address(vectors.get("norm.weight")),
        is_normed_first=config.norm == "before gates",
        num_normed=1 if mixer.normed_with is None else mixer.normed_with.size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_groups=config.num_groups,
        state_dim=config.state_dim,
        norm_eps=mixer.eps,
        least_step=config.step_limits[0],
        most_step=config.step_limits[1],
        **_common_parts(weights, mixer.convolution),
    )
    weights.place(described.rows, mixer.in_proj, bias)
    return described
