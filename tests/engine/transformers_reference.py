"""What `transformers` computes of the same checkpoint."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor


@lru_cache(maxsize=4)  # a test compares with few, and collections go through all that is kept
def reference_model(model_dir: Path) -> torch.nn.Module:
    import transformers

    architecture = json.loads((model_dir / "config.json").read_text())["architectures"][0]
    model: torch.nn.Module = getattr(transformers, architecture).from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


@cache
def reference_logprobs(model_dir: Path, token_ids: tuple[int, ...]) -> Tensor:
    """Return log-probabilities of what follows each token, [num_tokens, vocab_size] float32."""
    with torch.inference_mode():
        logits: Tensor = reference_model(model_dir)(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(-1)


def greedy_tokens(model_dir: Path, prompt: list[int], answer: list[int], sure_gap: float) -> list[int]:
    """Return the greedy ones, or the first of them: each leads by more than `sure_gap` between two logits.

    The `answer` is what is behind the prompt as long as it has the greedy tokens; behind its first other token they are
    of no use, and it is unlike them there. So one step judges all of an answer.
    """
    following = reference_logprobs(model_dir, (*prompt, *answer[:-1]))[len(prompt) - 1 :]
    best = following.topk(2)
    tokens: list[int] = []
    for (first, second), (token, _) in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if first - second <= sure_gap:
            break
        tokens.append(token)
    return tokens
