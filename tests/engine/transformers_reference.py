"""What `transformers` computes of the same checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def reference_logprobs(model_dir: Path, token_ids: tuple[int, ...]) -> Tensor:
    """Return log-probabilities of what follows each token, [num_tokens, vocab_size] float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32
    )
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(-1)
