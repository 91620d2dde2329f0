"""A gated delta net as C++ takes it (`native/layers/delta_net.hpp`): its matrices packed, all else in float32."""

from __future__ import annotations

from ..nn.delta_net import GatedDeltaNet
from .described import DELTA_NET, DeltaNetParts
from .packing import address
from .states import Described, common_parts


def describe(net: GatedDeltaNet, linear: Described, keep: list[object]) -> DeltaNetParts:
    """Describe it. `keep` gets what is pointed to and nobody else keeps."""
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
        **common_parts(net.convolution, keep),
    )
