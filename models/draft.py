"""A model may draft for another one where both mean the same by every token, and it has as many positions."""

from __future__ import annotations

from pathlib import Path

from ..common.errors import ConfigError
from .config import ModelConfig
from .tokenizer import Tokenizer


def check_draft(target_dir: Path, draft_dir: Path, max_model_len: int, num_ranks: int) -> ModelConfig:
    """Return the draft model's shape. Raises ConfigError where it cannot draft for the target on so many ranks."""
    draft = ModelConfig.from_dir(draft_dir)
    if draft.states is not None:
        raise ConfigError(f"speculative_config: the draft model {draft_dir} keeps states, which no draft can take back")
    if not draft.has_head:
        raise ConfigError(f"speculative_config: the draft model {draft_dir} has no head: it embeds, and drafts nothing")
    if draft.longest_model_len < max_model_len:
        raise ConfigError(
            f"speculative_config: the draft model {draft_dir} has {draft.longest_model_len} positions, and the served "
            f"one {max_model_len} ({target_dir}); give --max-model-len {draft.longest_model_len}"
        )
    try:
        draft.check_tp_size(num_ranks)
    except ConfigError as error:
        raise ConfigError(f"speculative_config: the draft model {draft_dir}: {error}") from error
    if target_dir.resolve() != draft_dir.resolve():
        _check_tokens(target_dir, draft_dir)
    return draft


def _check_tokens(target_dir: Path, draft_dir: Path) -> None:
    target, draft = (Tokenizer.from_dir(path).vocabulary for path in (target_dir, draft_dir))
    if target == draft:
        return
    token = min(target.items() ^ draft.items(), key=lambda pair: (pair[1], pair[0]))[0]
    ours, theirs = (f"is {found[token]}" if token in found else "is none" for found in (target, draft))
    raise ConfigError(
        f"speculative_config: the draft model has another tokenizer: token {token!r} {ours} of {len(target)} in "
        f"{target_dir} and {theirs} of {len(draft)} in {draft_dir}"
    )
