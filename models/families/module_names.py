"""Names of a language model's tensors and modules: checkpoints spell them in several ways."""

from __future__ import annotations

import re

_BARE = ("embed_tokens.", "layers.", "norm.")
# A language model that is one part of several, by its tensors' names before and since transformers 5.
_NESTED = {"language_model.": "", "model.language_model.": "model."}
# Nemotron-H's.
_BACKBONE = {"backbone.embeddings.": "model.embed_tokens.", "backbone.": "model."}


def is_bare(name: str) -> bool:
    """Tell whether a tensor's name is that in a language model by itself, as one without a head is saved."""
    return name.startswith(_BARE)


def full_name(name: str) -> str:
    """Return a tensor's name in a language model with a head.

    Its own may be that of a part of a larger model, or lack a prefix: embedding models are often saved without a head.
    """
    for prefix, own in (_NESTED | _BACKBONE).items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return f"model.{name}" if is_bare(name) else name


def matches(expression: str, module: str, *, is_nested: bool) -> bool:
    """Tell whether an expression fits a module's name, or another one that checkpoints have for it, as a part of a
    larger model among them.
    """
    others = _BACKBONE | _NESTED if is_nested else _BACKBONE
    names = [module, *(other + module.removeprefix(own) for other, own in others.items() if module.startswith(own))]
    return any(re.match(expression, name) for name in names)
