"""One token's attention over many keys, cut into parts that two threads share: the same numbers but for roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.common.request import Sequence

from ...checkpoints import write_checkpoint
from ...engine_driver import prompts
from .test_build import SAMPLING, Recorded

TOLERANCE = 0.012  # of the range of logits: sums are rounded in another order, attention's results to elements
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": ("llama", {"num_qo_heads": 9, "num_kv_heads": 3, "head_dim": 64}),
    "one head for all": ("llama", {"num_qo_heads": 7, "num_kv_heads": 1, "head_dim": 128}),
    "a window that ends within a part": ("mistral", {"sliding_window": 1300}),
    "a window shorter than a part": ("qwen2", {"sliding_window": 300, "num_layers": 3}),
    "capped scores": ("gemma2", {"head_dim": 32}),
}
BATCHES = [(3000,), (3000, 17), (1500, 1501, 1502), (1023, 1024, 2047)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        write_long_model(root, name)
    return root


def write_long_model(root: Path, name: str) -> Path:
    family, fields = MODELS[name]
    return write_checkpoint(root / name, family, tokenizer=False, dtype="bfloat16", max_model_len=4096, **fields)


def gap_of_threads(model_dir: Path, lengths: tuple[int, ...], num_blocks: int = 400, **fields: Any) -> float:
    """Decode from the same pages with one thread, which cuts nothing, and with two; return how far logits are apart."""
    fields |= {"is_native": True, "num_blocks": num_blocks}
    one, two = (Recorded(model_dir, num_threads=count, **fields) for count in (1, 2))
    has_states = one.engine.model_config.states is not None  # a state says of which token it is, and is computed
    seqs = one.prefill(lengths) if has_states else with_random_pages(one, lengths)
    others = [two.driver.add(seq.token_ids[: seq.num_prompt_tokens], SAMPLING) for seq in seqs]
    worst = 0.0
    for seq, other in zip(seqs, others, strict=True):
        two.driver.grow(other, seq.num_tokens)
        other.token_ids[:], other.num_computed_tokens = seq.token_ids, seq.num_computed_tokens
        other.block_table[:] = seq.block_table
    two.engine.kv_pages.copy_(one.engine.kv_pages)
    for _ in range(3):
        for run, own in ((one, seqs), (two, others)):
            run.driver.step([(seq, 1) for seq in own])
        for seq, other in zip(seqs, others, strict=True):
            other.token_ids[:] = seq.token_ids
        logits, wanted = two.logits[-1], one.logits[-1]
        worst = max(worst, float((logits - wanted).abs().max() / (wanted.max() - wanted.min())))
    return worst


def with_random_pages(run: Recorded, lengths: tuple[int, ...]) -> list[Sequence]:
    """Return running answers to prompts of these lengths, whose pages hold numbers of the size of computed ones."""
    seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)]
    for seq in seqs:
        run.driver.grow(seq, seq.num_tokens)
        seq.num_computed_tokens = seq.num_tokens
        seq.token_ids.append(7)
    run.engine.kv_pages.normal_(generator=torch.Generator().manual_seed(0))
    return seqs


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: "+".join(map(str, lengths)))
@pytest.mark.parametrize("name", MODELS)
def test_parts_make_the_whole(checkpoints: Path, name: str, lengths: tuple[int, ...]) -> None:
    assert gap_of_threads(checkpoints / name, lengths) <= TOLERANCE


@pytest.mark.usefixtures("isa")
def test_a_key_that_is_no_number_is_not_hidden_in_a_part(checkpoints: Path) -> None:
    assert_no_number_shows(checkpoints / "llama")


def assert_no_number_shows(model_dir: Path) -> None:
    """A page of a long context that is no number is seen in the answer, in whichever part it is."""
    run = Recorded(model_dir, is_native=True, num_blocks=400, num_threads=2)
    (seq,) = with_random_pages(run, (3000,))
    for place in (0, 90, 180):
        pages = run.engine.kv_pages[0, seq.block_table[place]]
        before = pages.clone()
        pages.fill_(torch.nan)
        run.driver.step([(seq, 1)])
        assert run.logits[-1].isnan().all() and not run.driver.outputs[-1].rows[0].is_finite
        pages.copy_(before)
        seq.num_computed_tokens -= 1
