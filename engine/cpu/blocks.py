"""The blocks of a decoder that C++ has code for, as it takes them: mixers with the feed-forward behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..nn.convolution import ShortConvolution
from ..nn.decoder import DecoderLayer
from ..nn.delta_net import GatedDeltaNet
from ..nn.experts import SparseMLP
from ..nn.feed_forward import MLP, GatedMLP, PlainMLP
from ..nn.latent import LatentAttention
from ..nn.mamba import Mamba
from ..nn.mixer import Attention, GatedAttention, NormedValueAttention, SideBySide
from ..nn.residual import ExpertsBeside
from ..nn.stacked_experts import StackedExpert
from . import states
from .compiler import NativeUnavailable

FeedForward = GatedMLP | PlainMLP | SparseMLP
_ATTENTION = (Attention, GatedAttention, LatentAttention, NormedValueAttention)
_STATEFUL = (GatedDeltaNet, Mamba, ShortConvolution)


class Blocks(NamedTuple):
    """A mixer, or two side by side, and the feed-forward behind, if one is, whether of one layer or of two: C++'s
    `Layer`.
    """

    attention: Attention | LatentAttention | None
    state: states.Stateful | None
    feed_forward: FeedForward | None
    beside: ExpertsBeside | None  # the feed-forward, an MLP
    layers: tuple[DecoderLayer, DecoderLayer]  # that of the mixer, and that of the feed-forward
    number: int  # of the mixer's


def known_blocks(layers: Sequence[DecoderLayer]) -> list[Blocks]:
    """Pair mixers with the feed-forwards behind them. Raises NativeUnavailable for kinds that C++ does not know."""
    blocks: list[Blocks] = []
    for number, layer in enumerate(layers):
        mixer, feed_forward = layer.mixer, layer.feed_forward
        mixers = [mixer.attention, mixer.stateful] if isinstance(mixer, SideBySide) else [mixer]
        attention = next((each for each in mixers if isinstance(each, Attention | LatentAttention)), None)
        state = next((each for each in mixers if isinstance(each, states.Stateful)), None)
        # A subclass computes something else.
        kinds = {type(each) for each in (*mixers, feed_forward)}
        if not kinds <= {*_ATTENTION, *_STATEFUL, GatedMLP, PlainMLP, SparseMLP, type(None)}:
            raise NativeUnavailable(f"no C++ for layers of {type(mixer).__name__} and {type(feed_forward).__name__}")
        assert isinstance(feed_forward, FeedForward | None)
        if mixer is not None:
            blocks.append(Blocks(attention, state, feed_forward, layer.beside, (layer, layer), number))
        elif blocks and blocks[-1].feed_forward is None:
            before = blocks.pop()
            blocks.append(before._replace(feed_forward=feed_forward, layers=(before.layers[0], layer)))
        else:
            raise NativeUnavailable("no C++ for feed-forwards without a mixer before each")
    return blocks


def mlps_of(block: Blocks) -> list[MLP | StackedExpert]:
    """Return its MLPs, dense or of experts and the shared one."""
    sparse = block.feed_forward if block.beside is None else block.beside.sparse
    if not isinstance(sparse, SparseMLP):
        return [] if sparse is None else [sparse]
    dense = [block.feed_forward] if isinstance(block.feed_forward, MLP) else []
    return [*dense, *sparse.experts, *([] if sparse.shared is None else [sparse.shared])]
