"""Fill-in-the-middle: models that were trained to write what stands between two texts, and how they are asked.

    BEFORE prefix BETWEEN suffix AFTER ─> the middle, then an end token

Each family has its own tokens for that; a model has them or has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...models.tokenizer import Tokenizer

# Before, between and after the two texts.
_FORMS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Qwen3-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
# A middle ends where one of these stands, besides the tokens of its form and the model's own ends.
_ENDS = (
    *("<|endoftext|>", "<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    *("<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<file_sep>", "▁<EOT>"),
)


@dataclass(slots=True, frozen=True)
class InfillForm:
    """A model's tokens for it."""

    before: int
    between: int
    after: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> InfillForm | None:
        """Return the form that the model knows; None: it knows none."""
        for tokens in _FORMS:
            before, between, after = map(tokenizer.added_id, tokens)
            if before is not None and between is not None and after is not None:
                ends = [token_id for token_id in map(tokenizer.added_id, _ENDS) if token_id is not None]
                return cls(before, between, after, (before, between, after, *ends))
        return None

    def prompt(self, begin: Sequence[int], prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Return the prompt; `begin` is what the model puts at the beginning of every text."""
        return [*begin, self.before, *prefix, self.between, *suffix, self.after]
