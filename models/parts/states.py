"""Layers that keep a state in place of keys and values, as config.json tells them: gated delta nets.

A state is what a layer knows of all tokens so far, of one size however many they are (Yang et al. 2024, "Gated Delta
Networks", section 3):

    inputs   the last `kernel_size - 1` tokens' rows, which the next token's convolution reaches back to
    memory   of each value head a matrix [key_dim, value_dim]: decayed and corrected by every token

The state behind a block's last computed token lies in the block, in pages behind those of keys and values. So a block
is all that is known up to its end: shared, handed over, kept and found again as one of any other model is.

    one block   layers with keys and values   [ 3 ][ 7 ][ 11 ]
                states, one behind another    [ 0, 1, part of 2 ][ rest of 2, 4, ... ]
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common.config import BLOCK_SIZE, LONG_BLOCK_SIZES, EngineConfig
from ...common.errors import ConfigError
from ..families.family import Family
from .config_fields import ConfigFields

Shape = tuple[int, ...]

_KINDS = ("linear_attention", "full_attention")
_ITEM_BYTES = 4  # float32, whatever the weights are: errors of thousands of tokens add up in a state


@dataclass(slots=True, frozen=True, kw_only=True)
class StatesConfig:
    """The layers with states, and their sizes, of the whole model."""

    layers: tuple[bool, ...]  # by layer: it keeps a state
    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head's key and query
    value_dim: int
    kernel_size: int  # tokens that the convolution sees
    is_grouped: bool  # the checkpoint has each key head's parts side by side in one tensor

    @property
    def num_layers(self) -> int:
        """Count the layers with states."""
        return sum(self.layers)

    @property
    def num_keys(self) -> int:
        """Count the numbers of a token's keys; its queries are as many."""
        return self.num_key_heads * self.key_dim

    @property
    def num_values(self) -> int:
        """Count the numbers of a token's values; its gates are as many."""
        return self.num_value_heads * self.value_dim

    @property
    def num_convolved(self) -> int:
        """Count the numbers of a token's row that the convolution takes: queries, keys and values."""
        return 2 * self.num_keys + self.num_values

    @property
    def num_inputs(self) -> int:
        """Count the numbers of a layer's state that are rows of earlier tokens."""
        return (self.kernel_size - 1) * self.num_convolved

    @property
    def layer_size(self) -> int:
        """Count the numbers of a layer's state: of how many tokens it is, their last rows, the memory."""
        return 1 + self.num_inputs + self.num_values * self.key_dim

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all layers' states of one sequence."""
        return self.num_layers * self.layer_size * _ITEM_BYTES

    def num_pages(self, page_bytes: int) -> int:
        """Count the pages of `page_bytes` that a block has for states."""
        return -(-self.num_bytes // page_bytes)

    def pieces(self, index: int, page_bytes: int) -> list[tuple[int, slice]]:
        """List where the state of the `index`th such layer lies: pages, counted from the first, and bytes in each."""
        start, end = (each * self.layer_size * _ITEM_BYTES for each in (index, index + 1))
        pages = range(start // page_bytes, -(-end // page_bytes))
        return [
            (page, slice(max(0, start - page * page_bytes), min(page_bytes, end - page * page_bytes))) for page in pages
        ]

    @property
    def row_parts(self) -> dict[str, int]:
        """Return the matrices of a token's row and gates, with their outputs."""
        convolved, gates = self.num_convolved, self.num_values
        return (
            {"in_proj_qkvz": convolved + gates} if self.is_grouped else {"in_proj_qkv": convolved, "in_proj_z": gates}
        )

    @property
    def rate_parts(self) -> dict[str, int]:
        """Return the matrices of a token's strengths and decays, with their outputs."""
        heads = self.num_value_heads
        return {"in_proj_ba": 2 * heads} if self.is_grouped else {"in_proj_b": heads, "in_proj_a": heads}

    def shapes(self, name: str, hidden_size: int) -> dict[str, Shape]:
        """Return the tensors of a layer's mixer `name`, by their names in a checkpoint."""
        sizes = self.row_parts | self.rate_parts
        shapes: dict[str, Shape] = {f"{name}.{part}.weight": (size, hidden_size) for part, size in sizes.items()}
        return shapes | {
            f"{name}.conv1d.weight": (self.num_convolved, 1, self.kernel_size),
            f"{name}.A_log": (self.num_value_heads,),
            f"{name}.dt_bias": (self.num_value_heads,),
            f"{name}.norm.weight": (self.value_dim,),
            f"{name}.out_proj.weight": (hidden_size, self.num_values),
        }


def read_states(fields: ConfigFields, family: Family) -> StatesConfig | None:
    """Return the states of a family that has some; None: every layer keeps keys and values. Raises ConfigError."""
    if family.states is None:
        return None
    num_key_heads, num_value_heads = (fields.count(f"linear_num_{part}_heads") for part in ("key", "value"))
    if num_value_heads % num_key_heads:
        raise fields.refuse("linear_num_value_heads", f"must be a multiple of linear_num_key_heads = {num_key_heads}")
    return StatesConfig(
        layers=_layers(fields),
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_dim=fields.count("linear_key_head_dim"),
        value_dim=fields.count("linear_value_head_dim"),
        kernel_size=fields.count("linear_conv_kernel_dim"),
        is_grouped=family.states == "grouped",
    )


def _layers(fields: ConfigFields) -> tuple[bool, ...]:
    num_layers, types = fields.count("num_hidden_layers"), fields.raw.get("layer_types")
    if types is None:
        step = fields.count("full_attention_interval")
        types = [_KINDS[(layer + 1) % step == 0] for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in _KINDS for kind in types):
        raise fields.refuse("layer_types", f"must name one of {_KINDS} for each of {num_layers} layers")
    if _KINDS[1] not in types:
        raise fields.refuse("layer_types", "a model without a layer that keeps keys and values is not supported")
    return tuple(kind == _KINDS[0] for kind in types)


def block_size_of(engine: EngineConfig, states: StatesConfig | None, kv_token_bytes: int) -> int:
    """Return the tokens of a block: as asked for, or by what a token's keys and values take in all layers.

    Each block has a state. By itself a block is long enough that states are at most half of what is kept, where that
    can be had: a shorter one would be a state with few tokens, a longer one would be mostly empty. Raises ConfigError.
    """
    if states is None:
        if engine.block_size in LONG_BLOCK_SIZES:
            raise ConfigError(f"block_size: {engine.block_size} tokens are for models that keep states; at most 128")
        return engine.block_tokens
    if engine.block_size is not None:
        return engine.block_size
    fits = [size for size in (BLOCK_SIZE, 32, 64, 128, *LONG_BLOCK_SIZES) if size * kv_token_bytes >= states.num_bytes]
    return fits[0] if fits else LONG_BLOCK_SIZES[-1]


def check_states(engine: EngineConfig, *, is_cuda: bool) -> None:
    """Refuse what is not built of models that keep states. Raises ConfigError."""
    if is_cuda:
        raise ConfigError("device: cuda has no kernels here for layers that keep a state: they run on CPUs alone")
    if engine.tensor_parallel_size > 1:
        raise ConfigError("tensor_parallel_size: layers that keep a state are computed by one rank alone; use 1")
    if engine.deterministic:
        raise ConfigError(
            "deterministic: layers that keep a state have no exact steps, and so no speculation; leave both away"
        )
