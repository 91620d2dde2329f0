"""First tokens over HTTP with an adapter that no worker has met, beside those with one that has a slot.

Each adapter is asked for twice, one right after the other, with prompts of one length and nothing in common; nothing
else runs. The files are in the page cache: the router has read them at its start. Medians.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.tools.chaos.serve_system import System, serving, until_ready
from kvferry.tools.load.endpoint import Endpoint
from kvferry.tools.load.prompts import PromptSource

_ANSWER_LEN = 4


@dataclass(slots=True, frozen=True)
class FirstTokens:
    """Milliseconds until the first token."""

    num_prompt_tokens: int
    num_pairs: int
    unseen_ms: float
    loaded_ms: float
    added_ms: float  # median of the pairs' differences


def measure_first_tokens(
    model_dir: Path, adapters: Sequence[Path], *, rank: int, num_slots: int, prompt_len: int, log_dir: Path
) -> FirstTokens:
    """Serve the model with these adapters, with a prefill and a decode worker of one thread each."""
    flags = ["--enable-lora", "--max-loras", str(num_slots), "--max-lora-rank", str(rank)]
    flags += ["--dtype", "bfloat16", "--num-threads", "1"]
    vocab_size = ModelConfig.from_dir(model_dir).vocab_size
    for path in adapters:
        flags += ["--lora-modules", f"{path.name}={path}"]
    with serving("adapters", model_dir, flags, log_dir) as system:
        pairs = asyncio.run(_ask(system, [path.name for path in adapters], prompt_len, vocab_size))
    return FirstTokens(
        prompt_len,
        len(pairs),
        unseen_ms=median(unseen for unseen, _ in pairs) * 1e3,
        loaded_ms=median(loaded for _, loaded in pairs) * 1e3,
        added_ms=median(unseen - loaded for unseen, loaded in pairs) * 1e3,
    )


async def _ask(system: System, names: Sequence[str], prompt_len: int, vocab_size: int) -> list[tuple[float, float]]:
    await until_ready(system)
    first_token_s = partial(ask_first_token_s, system.base_url, PromptSource(0, vocab_size), prompt_len)
    for _ in range(3):  # warm up
        await first_token_s(system.model)
    return [(await first_token_s(name), await first_token_s(name)) for name in names]


async def ask_first_token_s(base_url: str, prompts: PromptSource, prompt_len: int, model: str) -> float:
    """Ask for a short answer to a new prompt; return the seconds to its first token. Raises ConfigError for none."""
    endpoint = Endpoint(base_url, model=model, ignore_eos=True, temperature=0.0)
    try:
        record = await endpoint.send(prompts.make(prompt_len), _ANSWER_LEN)
    finally:
        endpoint.close()
    if not record.is_ok or record.ttft_s is None:
        raise ConfigError(f"a request with {model} failed: {record.error}")
    return record.ttft_s
