"""MLPs and experts behind a layer's mixer as C++ takes them, and what else goes to the residual stream."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..nn.decoder import DecoderLayer
from ..nn.experts import Gate, SharedGate, SparseMLP
from ..nn.feed_forward import MLP
from ..nn.layers import RMSNorm
from ..nn.residual import InputTable
from ..nn.stacked_experts import StackedExpert
from ..weights.weight import DenseWeight
from .blocks import Blocks
from .described import ExpertParts, LayerInputParts, LayerParts, MLPParts
from .packing import address
from .weights import Weights, weight_of


def take_factors(gate: Gate) -> None:
    """Have a gate's matrix multiply rows by their factors: from now on it is for rows as they are."""
    if gate.factors is not None:
        assert isinstance(gate.weight, DenseWeight)
        gate.weight.plain.mul_(gate.factors[0] * gate.weight.num_inputs**-0.5)


def describe_feed_forward(weights: Weights, block: Blocks, target: LayerParts) -> None:
    """Describe a block's MLP or experts, or both, or nothing."""
    feed_forward, beside = block.feed_forward, block.beside
    if isinstance(feed_forward, MLP):
        _place_mlp(weights, feed_forward, target.mlp)
    if isinstance(feed_forward, SparseMLP):
        target.experts = ctypes.pointer(_experts(weights, feed_forward, block.layers[1].mlp_norm))
    elif beside is not None:
        target.experts = ctypes.pointer(_experts(weights, beside.sparse, beside.sparse.row_norm))
        target.mlp_behind, target.experts_behind = address(beside.mlp_norm.weight), address(beside.norm.weight)


def describe_end(weights: Weights, layer: DecoderLayer, target: LayerParts) -> None:
    """Describe what a layer does to the residual stream behind its blocks."""
    target.factor = 1.0 if layer.factor is None else float(layer.factor.weight)
    if (own := layer.own_input) is not None:
        weights.place(target.own_input.gate, own.gate, None)
        weights.place(target.own_input.projection, own.projection, None)
        target.own_input.norm = address(own.norm.weight)


def describe_inputs(weights: Weights, table: InputTable) -> LayerInputParts:
    """Describe how layers' own inputs are made."""
    num_own = table.size // table.table.comm.size
    described = LayerInputParts(
        norm=address(table.norm.weight),
        table=address(table.table.weight.plain),
        size=table.size,
        first=table.table.comm.rank * num_own,
        num_own=num_own,
        first_token=table.table.start,
        num_tokens=table.table.num_rows,
        made_factor=table.made_multiplier,
        table_factor=table.multiplier,
    )
    weights.place(described.made, table.projection, None)
    return described


def _place_mlp(weights: Weights, mlp: MLP | StackedExpert, target: MLPParts) -> None:
    bias = mlp.down_proj.bias if isinstance(mlp, StackedExpert) else mlp.down_proj.sum_bias
    weights.place(target.gate_up, mlp.gate_up_proj, mlp.gate_up_proj.bias)
    weights.place(target.down, mlp.down_proj, bias)


def _experts(weights: Weights, sparse: SparseMLP, norm: RMSNorm | None) -> ExpertParts:
    config, factors = sparse.gate.experts, sparse.gate.factors
    experts = (MLPParts * len(sparse.experts))()
    for expert, target in zip(sparse.experts, experts, strict=True):
        _place_mlp(weights, expert, target)
    described = ExpertParts(
        gate=weights.linear(sparse.gate, sparse.gate.bias),
        norm=weight_of(norm),
        gate_norm=None if factors is None else weights.ones(len(factors[0])),
        weights=None if factors is None else address(factors[1]),
        score_bias=address(sparse.gate.score_bias),
        experts=experts,
        shared_gate=None if sparse.shared_gate is None else _plain(sparse.shared_gate),
        num_experts=config.num_experts,
        num_chosen=config.num_chosen,
        count=len(sparse.experts),
        num_groups=config.num_groups,
        num_chosen_groups=config.num_chosen_groups,
        is_sigmoid=config.scoring == "sigmoid",
        is_normalised=config.normalised,
        scales_inputs=config.scales_inputs,
        scale=config.scale,
        limit=config.limit if config.is_stacked else 0.0,
        alpha=config.alpha,
        taken=address(sparse.taken),
        place=address(_places(weights, sparse)),
        copies=None if sparse.replicas is None else address(sparse.replicas.copies),
        turn=None if sparse.replicas is None else address(sparse.replicas.turn),
    )
    if sparse.shared is not None:
        shared = MLPParts()
        _place_mlp(weights, sparse.shared, shared)
        described.shared = ctypes.pointer(shared)
    if (thin := sparse.narrowing) is not None:
        weights.place(described.before, thin.before, None)
        weights.place(described.behind, thin.behind, None)
    return described


def _places(weights: Weights, sparse: SparseMLP) -> Tensor:
    """Return where each expert stands among this rank's; -1: elsewhere."""
    places = torch.full((len(sparse.taken),), -1, dtype=torch.int32)
    places[list(sparse.held)] = torch.arange(len(sparse.held), dtype=torch.int32)
    weights.keep.append(places)
    return places


def _plain(gate: SharedGate) -> int | None:
    assert isinstance(gate.weight, DenseWeight)
    return address(gate.weight.plain)
