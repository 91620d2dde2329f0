"""A draft model's keys and values lie behind its target's in every block, in pages of the target's size.

    one block   target's layers   [  0  ][  1  ][  2  ] ...
                draft's layers    [0 1 2][3 4 5][6 _ _]      as many to a page as fit

So all pages of the allocation are equal, and whatever moves, copies, sums or keeps blocks takes the draft's layers
along without knowing of them. Both models have all their heads on one rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..common.errors import ConfigError
from ..common.kv_spec import row_items

if TYPE_CHECKING:
    from torch import Tensor


class KVShape(Protocol):
    """A `KVShape` says what a model keeps of a token; a `ModelConfig` does."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def num_kv_parts(self) -> int: ...

    @property
    def uneven(self) -> object: ...  # None: layers keep equally many numbers


def num_draft_pages(target: KVShape, draft: KVShape, dtype: str = "auto") -> int:
    """Count the pages that a block has for the draft model's layers. Raises ConfigError where they do not fit.

    `dtype`: of the cache, by its setting's or torch's name.
    """
    return -(-draft.num_layers // _layers_of_page(target, draft, dtype))


def draft_layers(pages: Tensor, target: KVShape, draft: KVShape) -> list[Tensor]:
    """View each of the draft's layers in the allocation, [num_blocks, 2, num_kv_heads, block_size, items of a row]."""
    num_blocks, block_size = pages.shape[1], pages.shape[4]
    dtype = str(pages.dtype).removeprefix("torch.")
    shape = (num_blocks, 2, draft.num_kv_heads, block_size, row_items(draft.head_dim, dtype))
    size = _token_size(draft, dtype) * block_size
    each, num_pages = _layers_of_page(target, draft, dtype), num_draft_pages(target, draft, dtype)
    rows = [pages[target.num_layers + page].view(num_blocks, -1) for page in range(num_pages)]
    return [
        rows[layer // each][:, layer % each * size : (layer % each + 1) * size].view(shape)
        for layer in range(draft.num_layers)
    ]


def _layers_of_page(target: KVShape, draft: KVShape, dtype: str) -> int:
    if target.num_kv_parts + draft.num_kv_parts < 4:
        raise ConfigError("speculative_config: a draft model goes with keys and values, not with latents; use ngram")
    if target.uneven is not None or draft.uneven is not None:
        raise ConfigError("speculative_config: a draft model goes with layers whose heads are of one size; use ngram")
    ours, theirs = _token_size(draft, dtype), _token_size(target, dtype)
    if ours > theirs or theirs % row_items(draft.head_dim, dtype):
        same = "; in int8, with scales, heads of both must be equally wide" if dtype == "int8" else ""
        raise ConfigError(
            f"speculative_config: {draft.num_kv_heads} KV heads of {draft.head_dim} of the draft model do not fit into "
            f"pages of the model, which has {target.num_kv_heads} of {target.head_dim}{same}"
        )
    return theirs // ours


def _token_size(model: KVShape, dtype: str) -> int:
    """Count the items of one token's keys and values in one layer."""
    return 2 * model.num_kv_heads * row_items(model.head_dim, dtype)
