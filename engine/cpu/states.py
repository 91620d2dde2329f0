"""Layers that keep a state as C++ takes them (`native/layers/model.hpp`): matrices packed, all else in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

from ..nn.convolution import Convolution, ShortConvolution
from ..nn.layers import Linear
from ..nn.mamba import Mamba
from .described import MAMBA, SHORT_CONVOLUTION, LinearParts, MambaParts, StateParts
from .packing import address

Described = Callable[[Linear, Tensor | None], LinearParts]  # a matrix with its bias


class CommonParts(TypedDict):
    """Every kind of `StateParts` has these of its convolution and of its state."""

    convolution: int | None
    convolution_bias: int | None
    kernel_size: int
    num_convolved: int
    num_values: int
    memory_size: int


def common_parts(convolution: Convolution, keep: list[object]) -> CommonParts:
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


def describe_convolution(mixer: ShortConvolution, linear: Described, keep: list[object]) -> StateParts:
    """Describe it. `keep` gets what is pointed to and nobody else keeps."""
    return StateParts(
        kind=SHORT_CONVOLUTION,
        rows=linear(mixer.in_proj, mixer.in_proj.bias),
        **common_parts(mixer.convolution, keep),
    )


def describe_mamba(mixer: Mamba, linear: Described, keep: list[object]) -> MambaParts:
    """Describe it. `keep` gets what is pointed to and nobody else keeps."""
    config, vectors = mixer.config, mixer.vectors.by_name
    forgetting = vectors["A_log"].exp()
    keep.append(forgetting)
    return MambaParts(
        kind=MAMBA,
        rows=linear(mixer.in_proj, mixer.in_proj.bias),
        num_rates=config.num_heads,
        forgetting=address(forgetting),
        step_bias=address(vectors["dt_bias"]),
        kept=address(vectors["D"]),
        norm=address(vectors["norm.weight"]),
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_groups=config.num_groups,
        state_dim=config.state_dim,
        norm_eps=mixer.eps,
        **common_parts(mixer.convolution, keep),
    )
