"""What `transformers` answers greedily in float32, and how clear each choice was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

CLEAR_GAP = 1e-4  # between the two best logits; below, rounding decides


@dataclass(frozen=True, slots=True)
class Reference:
    """One prompt's greedy continuation. `num_clear`: tokens before the first unclear one."""

    prompt: list[int]
    tokens: list[int]
    num_clear: int


def greedy(model_dir: Path, prompts: list[list[int]], num_tokens: int) -> list[Reference]:
    """Continue each prompt by itself with the reference implementation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model.eval()  # type: ignore[no-untyped-call]  # transformers
    return [_continue(model, prompt, num_tokens) for prompt in prompts]


@torch.inference_mode()
def _continue(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> Reference:
    tokens: list[int] = []
    num_clear: int | None = None
    ids, past = torch.tensor([prompt]), None
    for _ in range(num_tokens):
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        best = out.logits[0, -1].topk(2)
        if num_clear is None and float(best.values[0] - best.values[1]) < CLEAR_GAP:
            num_clear = len(tokens)
        tokens.append(int(best.indices[0]))
        ids, past = best.indices[:1].view(1, 1), out.past_key_values
    return Reference(prompt, tokens, num_tokens if num_clear is None else num_clear)


def assert_equal(answers: list[list[int]], references: list[Reference], mode: str) -> None:
    """Every answer equals its reference as far as that is clear; at most 1 % of sequences end early."""
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        clear = reference.num_clear
        assert len(answer) == len(reference.tokens)
        assert answer[:clear] == reference.tokens[:clear], (
            f"{mode}: prompt {number} of {len(reference.prompt)} tokens: {answer} is not {reference.tokens}"
        )
    unclear = sum(reference.num_clear < len(reference.tokens) for reference in references)
    assert unclear <= max(1, len(references) // 100), f"{unclear} of {len(references)} references are unclear"
