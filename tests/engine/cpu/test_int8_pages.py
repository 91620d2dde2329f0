"""Pages of whole numbers in C++: torch's numbers, whatever the instruction set, and exact where results shall be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.attention.int8_rows import widened

from ...checkpoints import write_checkpoint
from ...engine_driver import make_engine, prompts
from .test_build import FEW_TOKENS, MANY_TOKENS, SAMPLING, VARIANTS, Recorded, assert_exact

TOLERANCE = 2e-3  # of the range of logits: a number between two steps may be rounded to either
NAMES = ["llama", "llama without sharing", "llama, many heads to one", "mistral window", "qwen2 window", "gemma2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        family, fields = VARIANTS[name]
        write_checkpoint(root / name, family, **({"tokenizer": False} | fields))  # type: ignore[arg-type]
    return root


def _elements(run: Recorded) -> Tensor:
    pages = run.engine.kv_pages
    rows = pages.reshape(-1, pages.shape[-2] * pages.shape[-1])
    return widened(rows, pages.shape[-2], torch.float32)


@pytest.mark.parametrize("lengths", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize(("name", "block_size"), [*((name, 16) for name in NAMES), ("llama", 128), ("qwen2 window", 8)])
def test_float32_computes_what_torch_does(
    checkpoints: Path, name: str, block_size: int, lengths: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
) -> None:
    """Chunks of several prompts beside running answers, then answers alone, in two threads."""
    sizes, steps = lengths
    fields: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "int8", "block_size": block_size, "num_threads": 2}
    fields["num_blocks"] = 128
    runs = [Recorded(checkpoints / name, is_native=native, **fields) for native in (True, False)]
    ours, theirs = ([run.driver.add(prompt, SAMPLING) for prompt in prompts(list(sizes), 500)] for run in runs)
    for counts in (*steps, *[(1,) * len(sizes)] * 2):
        for run, seqs in zip(runs, (ours, theirs), strict=True):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        for one, other in zip(ours, theirs, strict=True):
            one.token_ids[:] = other.token_ids
        logits, wanted = (run.logits[-1] for run in runs)
        assert (logits - wanted[: len(logits)]).abs().max() <= TOLERANCE * (wanted.max() - wanted.min())
        pages, wanted = map(_elements, runs)
        assert (pages - wanted).abs().max() <= wanted.abs().max() / 100
        assert torch.equal(pages.any(-1), wanted.any(-1)), "a slot was written by one and not by the other"
    torch.set_num_threads(1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_set_attends_to_what_the_numbers_mean(checkpoints: Path, name: str) -> None:
    """Within what bfloat16 and eight bits lose, against float32 that is not rounded at all."""
    ours = Recorded(checkpoints / name, is_native=True, kv_cache_dtype="int8")
    theirs = Recorded(checkpoints / name, is_native=False, dtype="float32")
    seqs = [[run.driver.add(prompt, SAMPLING) for prompt in prompts([300, 64, 9], 500)] for run in (ours, theirs)]
    for counts in ((150, 60, 9), (150, 4, 1), (1, 1, 1), (1, 1, 1)):
        for run, own in zip((ours, theirs), seqs, strict=True):
            run.driver.step(list(zip(own, counts, strict=True)))
        for one, other in zip(*seqs, strict=True):
            one.token_ids[:] = other.token_ids
        logits, wanted = ours.logits[-1], theirs.logits[-1]
        assert (logits - wanted[: len(logits)]).abs().max() <= 0.08 * (wanted.max() - wanted.min())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", ["llama without sharing", "qwen2 window"])
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, name: str) -> None:
    assert_exact(checkpoints / name, dtype="bfloat16", kv_cache_dtype="int8")


def test_what_an_earlier_owner_left_is_not_seen(checkpoints: Path) -> None:
    """Scales that are no numbers, behind every sequence's last token."""
    found = []
    for left in (0, -1):
        run = Recorded(checkpoints / "mistral window", is_native=True, kv_cache_dtype="int8")
        run.engine.kv_pages.fill_(left)  # four bytes of -1 are NaN
        seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts([30, 301, 16], 500)]
        for counts in ((30, 200, 16), (1, 101, 1), (1, 1, 1)):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        found.append(torch.cat(run.logits))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_a_key_that_is_no_number_is_not_hidden(checkpoints: Path) -> None:
    run = Recorded(checkpoints / "llama", is_native=True, kv_cache_dtype="int8")
    (seq,) = run.prefill((20,))
    pages = run.engine.kv_pages
    pages[0, seq.block_table[0]].fill_(-1)
    run.driver.step([(seq, 1)])
    assert run.logits[-1].isnan().all()


def test_latents_are_refused(tmp_path: Path) -> None:
    from ...deepseek import write_deepseek

    with pytest.raises(ConfigError, match="kv_cache_dtype: int8 keeps keys and values of heads, not latents"):
        make_engine(write_deepseek(tmp_path), kv_cache_dtype="int8")
