from __future__ import annotations

from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.traces import TraceRow


def test_ids_have_the_length_asked_for_and_are_below_the_vocabulary() -> None:
    prompt = PromptSource(0, vocab_size=50).make(400)
    assert len(prompt) == 400
    assert all(isinstance(token_id, int) and 0 <= token_id < 50 for token_id in prompt)


def test_text_has_a_word_for_each_token() -> None:
    prompt = PromptSource(0, vocab_size=None).make(30)
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 30


def test_equal_seeds_repeat_and_others_do_not() -> None:
    first, again, other = PromptSource(1, 4096), PromptSource(1, 4096), PromptSource(2, 4096)
    prompts = [first.make(20) for _ in range(3)]
    assert prompts == [again.make(20) for _ in range(3)]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert other.make(20) != prompts[0]


def test_rows_share_prompt_blocks_exactly_where_the_trace_says_so() -> None:
    source = PromptSource(0, 4096)
    first = list(source.make_for(TraceRow(0, 130, 1, (5, 6, 7), block_tokens=50)))
    second = list(source.make_for(TraceRow(0, 120, 1, (5, 6, 8), block_tokens=50)))
    assert (len(first), len(second)) == (130, 120)
    assert first[:100] == second[:100]
    assert first[100:] != second[100:]


def test_tokens_beyond_the_recorded_blocks_are_never_shared() -> None:
    source = PromptSource(0, 4096)
    row = TraceRow(0, 80, 1, (5,), block_tokens=50)
    first, second = list(source.make_for(row)), list(source.make_for(row))
    assert first[:50] == second[:50]
    assert first[50:] != second[50:]
