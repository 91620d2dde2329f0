"""What `transformers` computes of the same checkpoint."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
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


@cache
def greedy_tokens(model_dir: Path, prompt: tuple[int, ...], num_tokens: int, sure_gap: float) -> list[int]:
    """Return `num_tokens` greedy ones, or fewer: each leads by more than `sure_gap` between two logits."""
    tokens: list[int] = []
    given, kept = list(prompt), None
    with torch.inference_mode():
        while len(tokens) < num_tokens:
            output = reference_model(model_dir)(torch.tensor([given]), past_key_values=kept, use_cache=True)
            logits, kept = output.logits[0, -1], output.past_key_values
            best = logits.topk(2).values
            if best[0] - best[1] <= sure_gap:
                break
            tokens.append(int(logits.argmax()))
            given = tokens[-1:]
    return tokens
