"""Layers that keep a state as C++ takes them (`native/layers/model.hpp`): matrices packed, all else in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ..nn.convolution import Convolution, ShortConvolution
from ..nn.delta_net import GatedDeltaNet
from ..nn.layers import Linear
from ..nn.mamba import Mamba
from .described import DELTA_NET, MAMBA, SHORT_CONVOLUTION, DeltaNetParts, LinearParts, MambaParts, StateParts
from .packing import address

Stateful = GatedDeltaNet | Mamba | ShortConvolution
Described = Callable[[Linear, Tensor | None], LinearParts]  # a matrix with its bias


class _CommonParts(TypedDict):
    """Every kind of `StateParts` has these of its convolution and of its state."""

    convolution: int | None
    convolution_bias: int | None
    kernel_size: int
    num_convolved: int
    num_values: int
    memory_size: int


def _common_parts(convolution: Convolution, keep: list[object]) -> _CommonParts:
    """Describe what all kinds have. `keep` gets what is pointed to and nobody else keeps."""
    config = convolution.config
    by_token = convolution.weight.squeeze(1).T.contiguous()
    keep.append(by_token)
    return {
        "convolution": address(by_token),
        "convolution_bias": address(convolution.bias),
        "kernel_size": config.kernel_size,
        "num_convolved": config.num_convolved,
        "num_values": config.num_values,
        "memory_size": math.prod(config.memory_shape),
    }


def describe(mixer: Stateful, linear: Described, keep: list[object], *, inputs: float = 1.0) -> StateParts:
    """Describe it, as its kind is. `keep` gets what is pointed to and nobody else keeps. `inputs`: what the mixer's are
    multiplied by, if it stands beside attention.
    """
    if isinstance(mixer, Mamba):
        return _mamba(mixer, linear, keep, inputs)
    assert inputs == 1.0
    return _delta_net(mixer, linear, keep) if isinstance(mixer, GatedDeltaNet) else _convolution(mixer, linear, keep)


def _convolution(mixer: ShortConvolution, linear: Described, keep: list[object]) -> StateParts:
    return StateParts(
        kind=SHORT_CONVOLUTION,
        rows=linear(mixer.in_proj, mixer.in_proj.bias),
        **_common_parts(mixer.convolution, keep),
    )


def _delta_net(net: GatedDeltaNet, linear: Described, keep: list[object]) -> DeltaNetParts:
    config, vectors = net.config, net.vectors.by_name
    forgetting = vectors["A_log"].exp()
    keep.append(forgetting)
    return DeltaNetParts(
        kind=DELTA_NET,
        rows=linear(net.rows_proj, None),
        rates=linear(net.rates_proj, None),
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
        **_common_parts(net.convolution, keep),
    )


def _mamba(mixer: Mamba, linear: Described, keep: list[object], inputs: float) -> MambaParts:
    config, vectors, bias, factors = mixer.config, mixer.vectors.by_name, mixer.in_proj.bias, mixer.factors
    forgetting = vectors["A_log"].exp()
    if inputs != 1.0:  # of products in place of what is multiplied
        factors = inputs * (torch.ones(mixer.in_proj.weight.num_outputs) if factors is None else factors)
        bias = None if bias is None else bias / inputs
    keep += [forgetting, factors]
    return MambaParts(
        kind=MAMBA,
        rows=linear(mixer.in_proj, bias),
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
        **_common_parts(mixer.convolution, keep),
    )
