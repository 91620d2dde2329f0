"""How far each token of a greedy answer is from what plain float32 arithmetic would have chosen.

One pass over prompt and answer gives the logits before each answered token, all with the answer itself as context: an
answer that took the other of two equal tokens early is judged by what follows from it. A token's gap is the best
logit less its own: 0 where float32 chooses the same. By transformers where it is installed, else by our own engine
in float32 on the CPU, whose log-probabilities differ by the same gaps.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import EngineConfig
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.engine import Engine


@dataclass(slots=True, frozen=True)
class Answer:
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def answer_gaps(model_dir: Path, answers: Many[Answer], num_threads: int) -> tuple[list[list[float]], str]:
    """For each answer its tokens' gaps; and by what."""
    if importlib.util.find_spec("transformers") is not None:
        return _by_transformers(model_dir, answers, num_threads), "transformers in float32"
    return gaps_by_engine(model_dir, answers, num_threads), "our engine in float32 on the CPU"


def _by_transformers(model_dir: Path, answers: Many[Answer], num_threads: int) -> list[list[float]]:
    import torch

    torch.set_num_threads(num_threads)
    transformers = importlib.import_module("transformers")  # by name: it is no dependency of ours
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.eval()
    gaps = []
    with torch.inference_mode():
        for answer in answers:
            known = torch.tensor([answer.prompt + answer.tokens[:-1]])
            logits = model(known, logits_to_keep=len(answer.tokens)).logits[0].float()  # [answered tokens, vocab]
            chosen = logits.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
            gaps.append((logits.amax(1) - chosen).tolist())
    return gaps


def gaps_by_engine(model_dir: Path, answers: Many[Answer], num_threads: int) -> list[list[float]]:
    longest = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
    config = EngineConfig(
        model_dir=model_dir,
        served_model_name="reference",
        dtype="float32",
        device="cpu",
        num_threads=num_threads,
        max_num_batched_tokens=longest,
    )
    engine = Engine(config, num_blocks=-(-longest // config.block_tokens))
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    gaps = []
    for answer in answers:
        tokens = [*answer.prompt, *answer.tokens]
        seq = Sequence(RequestId("reference"), 0, 0, tokens, len(tokens), sampling)
        seq.block_table = list(range(engine.spec.num_blocks_for(len(tokens))))
        [row] = engine.step(Batch([BatchRow(seq, len(tokens))])).rows
        scored = row.prompt_logprobs[len(answer.prompt) - 1 :]
        gaps.append([token.top[0][1] - (token.logprob or 0.0) for token in scored])
    return gaps
