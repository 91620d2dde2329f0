"""A gated delta net as C++ takes it (`native/delta_net.hpp`): its matrices packed, all else in float32."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..nn.delta_net import GatedDeltaNet
from ..nn.layers import Linear
from .described import DeltaNetParts, LinearParts
from .packing import address


def describe(
    net: GatedDeltaNet, linear: Callable[[Linear, Tensor | None], LinearParts], keep: list[object]
) -> DeltaNetParts:
    """Describe it. `linear` describes a matrix with its bias; `keep` gets what is pointed to and nobody else keeps."""
    config, vectors = net.config, net.vectors.by_name
    convolution, forgetting = net.convolution.weight.squeeze(1).T.contiguous(), vectors["A_log"].exp()
    keep += [convolution, forgetting]
    return DeltaNetParts(
        rows=linear(net.rows_proj, None),
        rates=linear(net.rates_proj, None),
        convolution=address(convolution),
        forgetting=address(forgetting),
        rate_bias=address(vectors["dt_bias"]),
        norm=address(net.norm.weight),
        num_key_heads=config.num_key_heads,
        num_value_heads=config.num_value_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        kernel_size=config.kernel_size,
        is_grouped=config.is_grouped,
        norm_eps=net.norm.eps,
    )
