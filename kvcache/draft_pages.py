"""A draft model's keys and values lie behind its target's in every block, in pages of the target's size.

    one block      target's layers   [  0  ][  1  ][  2  ] ...
                   draft's layers    [0 1 2][3 4 5][6 _ _]      as many to a page as fit
    such a page    keys [ head 0: 0 1 2 ][ head 1: 0 1 2 ]  values [ head 0: 0 1 2 ][ head 1: 0 1 2 ]

So all pages of the allocation are equal, and whatever moves, copies, sums or keeps blocks takes the draft's layers
along without knowing of them. Ranks share the heads of both models; as a head's layers lie together, the part of a page
that one rank writes to another of a pool with more or fewer ranks has the draft's heads that this one has.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(slots=True, frozen=True)
class DraftPages:
    """A draft model's layers lie in the pages of one rank like this. A row: one token's numbers of one head."""

    first_page: int  # of a block: those before it are the target's
    num_layers: int  # of the draft model
    num_heads: int  # of the draft model on this rank
    row_items: int
    part_rows: int  # rows of a token's keys in a page, and of its values
    head_layers: int  # layers to a head's part of a page, so to a page
    name: str  # pages of equal names mean the same, whatever the number of ranks

    @property
    def num_pages(self) -> int:
        """Count the pages that a block has for the draft model's layers."""
        return -(-self.num_layers // self.head_layers)

    def layers(self, pages: Tensor) -> list[Tensor]:
        """View each of the draft's layers in the allocation, [num_blocks, 2, heads, block_size, items of a row].

        A block, its values and each head begin a multiple of [block_size, items of a row] behind what is before them.
        """
        num_blocks, block_size = pages.shape[1], pages.shape[4]
        part, head = self.part_rows * block_size * self.row_items, block_size * self.row_items
        found = []
        for layer in range(self.num_layers):
            page, place = divmod(layer, self.head_layers)
            parts = pages[self.first_page + page].view(num_blocks, -1)[:, : 2 * part].view(num_blocks, 2, part)
            heads = parts[..., : self.num_heads * self.head_layers * head].view(num_blocks, 2, self.num_heads, -1)
            rows = heads[..., place * head : (place + 1) * head]
            found.append(rows.view(num_blocks, 2, self.num_heads, block_size, self.row_items))
        return found


def draft_pages(target: KVShape, draft: KVShape, dtype: str = "auto", num_ranks: int = 1) -> DraftPages:
    """Lay out a draft model that shares ranks with its target. Raises ConfigError where it does not fit into the pages.

    `dtype`: of the cache, by its setting's or torch's name.
    """
    if target.num_kv_parts + draft.num_kv_parts < 4:
        raise ConfigError("speculative_config: a draft model goes with keys and values, not with latents; use another")
    if target.uneven is not None or draft.uneven is not None:
        raise ConfigError("speculative_config: a draft model goes with layers whose heads are of one size; use another")
    num_theirs, num_ours = (max(1, model.num_kv_heads // num_ranks) for model in (target, draft))
    row, part_items = row_items(draft.head_dim, dtype), num_theirs * row_items(target.head_dim, dtype)
    part_rows = part_items // row
    if num_ours > part_rows or 2 * part_items % row:
        same = "; in int8, with scales, heads of both must be equally wide" if dtype == "int8" else ""
        on_rank = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
        raise ConfigError(
            f"speculative_config: {num_ours} KV heads of {draft.head_dim} of the draft model do not fit into "
            f"pages of the model, which has {num_theirs} of {target.head_dim}{on_rank}{same}"
        )
    head_layers = part_rows // num_ours
    is_filled = num_ours * head_layers * row == part_items
    counts = (target.num_kv_heads, draft.num_kv_heads)
    are_shared_alike = counts[0] == counts[1] or not any(count % num_ranks for count in counts)
    return DraftPages(
        first_page=target.num_layers,
        num_layers=draft.num_layers,
        num_heads=num_ours,
        row_items=row,
        part_rows=part_rows,
        head_layers=head_layers,
        name="by heads" if is_filled and are_shared_alike else f"of {num_ranks} ranks",
    )
