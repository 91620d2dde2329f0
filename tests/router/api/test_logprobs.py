"""Log probabilities in the forms of the API: which entries there are, and in which order."""

from __future__ import annotations

from kvferry.common.request import SampledToken
from kvferry.router.api.logprobs import completion_logprobs, prompt_logprobs, token_names

from ..fakes import toy_tokenizer

A, B, C, HALF, OTHER_HALF = 97, 98, 99, 0xC3, 0xC4  # of one byte each: halves read the same


def test_a_prompts_own_token_stands_before_those_that_are_likelier() -> None:
    """Clients that sum a perplexity take the first entry of each."""
    ranked = ((A, -0.5), (B, -1.5))
    unlikely, second = SampledToken(C, -9.0, ranked, 40), SampledToken(B, -1.5, ranked, 2)
    _, first, last = prompt_logprobs([unlikely, second], toy_tokenizer(), 2)
    assert first is not None and last is not None
    assert [(key, entry.logprob, entry.rank) for key, entry in first.items()] == [
        ("99", -9.0, 40), ("97", -0.5, 1), ("98", -1.5, 2),
    ]  # fmt: skip
    assert [(key, entry.logprob, entry.rank) for key, entry in last.items()] == [("98", -1.5, 2), ("97", -0.5, 1)]


def test_a_completions_chosen_token_stands_before_the_best() -> None:
    tokenizer = toy_tokenizer()
    name = token_names(tokenizer, as_ids=False)
    ranked = ((A, -0.5), (B, -1.5))
    found = completion_logprobs([SampledToken(C, -9.0, ranked), SampledToken(B, -1.5, ranked)], [0, 1], name, 2)
    assert [list(top.items()) for top in found.top_logprobs if top is not None] == [
        [("c", -9.0), ("a", -0.5), ("b", -1.5)],
        [("b", -1.5), ("a", -0.5)],
    ]


def test_of_tokens_that_read_the_same_the_best_one_counts() -> None:
    name = token_names(toy_tokenizer(), as_ids=False)
    token = SampledToken(HALF, -3.0, ((A, -0.5), (OTHER_HALF, -1.5)))
    assert completion_logprobs([token], [0], name, 2).top_logprobs == [{"\ufffd": -1.5, "a": -0.5}]
