"""What `transformers` answers greedily in float32, and how clear each choice was.

`greedy` makes an answer, a token at a time. `Teacher` judges answers that are there: one pass over prompt and answer
has the model's choice after each of its beginnings, which takes a hundredth of the time for a long one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
    model = _load(model_dir)
    return [_continue(model, prompt, num_tokens) for prompt in prompts]


def _load(model_dir: Path) -> torch.nn.Module:
    import transformers

    # Scores of 3,000 tokens beside each other take a second to be given memory for: left to torch where it can do all.
    config = transformers.AutoConfig.from_pretrained(model_dir)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    attention = "eager" if is_capped or config.model_type == "gpt_oss" else "sdpa"
    own_class = getattr(transformers, config.architectures[0])  # the Auto classes have none for some that see, too
    model = own_class.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=attention)
    model.eval()
    return cast(torch.nn.Module, model)


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


class Teacher:
    """The reference implementation's judgement of whole answers."""

    def __init__(self, model_dir: Path) -> None:
        self._model = _load(model_dir)
        self._known: dict[tuple[int, ...], Reference] = {}

    def assert_greedy(self, prompts: list[list[int]], answers: list[list[int]], mode: str) -> None:
        """Every token is the model's choice after those before it, as far as the choices are clear."""
        references = [self._after(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        assert_equal(answers, references, mode)

    @torch.inference_mode()
    def _after(self, prompt: list[int], answer: list[int]) -> Reference:
        """Choices after each beginning of the answer: equal to it up to the first one that differs."""
        key = (*prompt, -1, *answer)
        if key not in self._known:
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            best = self._model(ids, use_cache=False, logits_to_keep=len(answer)).logits[0].topk(2)
            unclear = (best.values[:, 0] - best.values[:, 1] < CLEAR_GAP).nonzero()
            num_clear = int(unclear[0]) if len(unclear) else len(answer)
            self._known[key] = Reference(prompt, best.indices[:, 0].tolist(), num_clear)
        return self._known[key]


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
