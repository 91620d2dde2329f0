"""Suffix decoding: what earlier answers are found by, whose they are, and what is drafted from them."""

from __future__ import annotations

from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.config import SpeculativeConfig
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.ngrams import MAX_INDEXED
from kvferry.decode.speculation import Speculation
from kvferry.decode.suffixes import EarlierAnswers, SuffixProposer

CONFIG = SpeculativeConfig(method="suffix")
SIZES = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(8, 40))  # n-gram, answers, tokens
ANSWERS = st.lists(st.tuples(st.sampled_from((b"a", b"b")), st.lists(st.integers(0, 3), max_size=12)), max_size=12)


class PlainAnswers:
    """The same in words of its own: all tokens that were ever written, and where each answer begins."""

    def __init__(self, ngram: int, max_answers: int, max_tokens: int) -> None:
        self.ngram, self.max_answers, self.max_tokens = ngram, max_answers, max_tokens
        self.written: list[tuple[bytes, int] | None] = [None]
        self.starts: list[int] = []

    def add(self, owner: bytes, tokens: list[int]) -> None:
        if len(tokens) > self.ngram and self.max_answers:
            self.starts.append(len(self.written))
            self.written += [None, *((owner, token) for token in tokens)]

    def places(self, owner: bytes, tokens: list[int]) -> list[int]:
        oldest = self.starts[-self.max_answers :][:1] or [0]
        first = max(oldest[0], len(self.written) - self.max_tokens)
        ngram = [(owner, token) for token in tokens[len(tokens) - self.ngram :]]
        found = [
            end
            for end in range(first + self.ngram, len(self.written) + 1)
            if self.written[end - self.ngram : end] == ngram
        ]
        return found[::-1] if len(ngram) == self.ngram else []

    def behind(self, place: int, count: int) -> list[int]:
        return [
            each[1] for each in takewhile(lambda each: each is not None, self.written[place : place + count]) if each
        ]


@given(
    ANSWERS,
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(8, 40),
    st.integers(1, 9),
)
def test_earlier_answers_are_found_by_their_n_grams_while_they_are_kept(
    answers: list[tuple[bytes, list[int]]],
    tokens: list[int],
    ngram: int,
    max_answers: int,
    max_tokens: int,
    portion: int,
) -> None:
    earlier, plain = EarlierAnswers(ngram, max_answers, max_tokens), PlainAnswers(ngram, max_answers, max_tokens)
    for owner, said in answers:
        earlier.add(owner, said)
        plain.add(owner, said)
        while earlier._waiting:
            earlier.take_in(portion)
    for owner in (b"a", b"b", b"c"):
        # Keys are those of numbers of 64 bits: none is another n-gram's here.
        places = list(earlier.places(owner, tokens))
        assert places == plain.places(owner, tokens)
        for place in places:
            assert earlier.behind(place, 5) == plain.behind(place, 5)
    assert len(earlier._latest) <= max_tokens  # nothing is kept of what is gone


def proposer(*answers: tuple[bytes, list[int]], owner: bytes = b"a", **config: object) -> SuffixProposer:
    settings = SpeculativeConfig.model_validate({"method": "suffix"} | config)
    earlier = EarlierAnswers(settings.prompt_lookup_min, settings.suffix_decoding_max_cached_requests)
    for each in answers:
        earlier.add(*each)
    earlier.take_in()
    return SuffixProposer(settings, earlier, owner)


def test_a_draft_goes_on_as_an_earlier_answer_did() -> None:
    drafts = proposer((b"a", [1, 2, 3, 4, 5, 6, 7, 8]))
    assert drafts.propose([9, 2, 3, 4], 16) == (5, 6, 7)  # as long as its match
    assert drafts.propose([9, 2, 3, 4], 2) == (5, 6)
    assert drafts.propose([9, 3, 9, 9, 4], 16) == ()
    assert drafts.propose([9, 2, 3, 4, 5, 6], 16) == (7, 8)  # where it ended, the draft ends


def test_answers_of_others_draft_nothing() -> None:
    answer = (b"b", [1, 2, 3, 4, 5, 6])
    assert proposer(answer).propose([1, 2, 3], 16) == ()
    assert proposer(answer, owner=b"b").propose([1, 2, 3], 16) == (4, 5, 6)


def test_the_longest_match_counts_and_of_equals_what_followed_most_often() -> None:
    assert proposer((b"a", [7, 1, 2, 3]), (b"a", [8, 1, 2, 4])).propose([7, 1, 2], 1) == (3,)
    often = proposer((b"a", [8, 1, 2, 4]), (b"a", [8, 1, 2, 4]), (b"a", [8, 1, 2, 3]))
    assert often.propose([7, 1, 2], 1) == (4,)
    assert proposer((b"a", [8, 1, 2, 4, 4]), suffix_decoding_max_spec_factor=0.5).propose([9, 1, 2], 16) == (4,)


def test_a_draft_ends_where_nothing_is_likely() -> None:
    answers = [(b"a", [1, 2, 3, first, *rest]) for first, *rest in ((4, 5), (4, 6), (5, 7), (6, 8))]
    assert proposer(*answers, suffix_decoding_min_token_prob=0.3).propose([1, 2, 3], 16) == (4,)
    assert len(proposer(*answers, suffix_decoding_min_token_prob=0.2).propose([1, 2, 3], 16)) == 2
    assert proposer(*answers, suffix_decoding_min_token_prob=0.6).propose([1, 2, 3], 16) == ()


def test_its_own_tokens_count_as_much() -> None:
    assert proposer().propose([1, 2, 3, 4, 1, 2, 3], 16) == (4, 1, 2)
    assert proposer((b"a", [2, 3, 9, 9])).propose([1, 2, 3, 4, 1, 2, 3], 2) == (4, 1)  # the longer match
    assert proposer().propose([5, 1, 2, 1, 2, 1, 2], 4) == (1, 2, 1, 2)  # beyond its end


def _propose(speculation: Speculation, seq: Sequence) -> tuple[int, ...]:
    speculation.draft([], 0, lambda seq, count: count)  # what has ended is taken in where a step is made
    return speculation.make_proposer(seq).propose(seq.token_ids, 16)


def _sequence(prompt: list[int], answer: list[int], **fields: object) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=100)
    seq = Sequence(RequestId("r"), 0, 0, [*prompt, *answer], len(prompt), params)
    for name, value in fields.items():
        setattr(seq, name, value)
    return seq


@pytest.mark.parametrize(
    ("fields", "drafted"),
    [
        ({"cache_salt": b"x", "adapter": "fr"}, (21, 22, 23)),
        ({"cache_salt": b"y", "adapter": "fr"}, ()),
        ({"cache_salt": b"x"}, ()),
    ],
)
def test_what_has_ended_drafts_for_its_tenant_and_adapter(fields: dict[str, object], drafted: tuple[int, ...]) -> None:
    speculation = Speculation(CONFIG, 200)
    speculation.forget(_sequence([1, 2, 9], [20, 21, 22, 23], cache_salt=b"x", adapter="fr"))
    seq = _sequence([5, 2, 9], [20], **fields)
    assert _propose(speculation, seq) == drafted


def test_a_prompt_drafts_for_nobody_else() -> None:
    speculation = Speculation(CONFIG, 200)
    prompt = list(range(100, 160))
    speculation.forget(_sequence(prompt, [7, 8, 9]))
    speculation.forget(_sequence(prompt, []))  # ended before it said anything
    for one, other in pairwise(prompt[: -CONFIG.suffix_decoding_max_tree_depth]):
        seq = _sequence([1, one], [other])
        assert _propose(speculation, seq) == ()


def test_long_answers_are_taken_in_over_several_steps() -> None:
    earlier = EarlierAnswers(2, 10)
    earlier.add(b"a", list(range(2 * MAX_INDEXED)))
    found = []
    for _ in range(3):
        found.append(list(earlier.places(b"a", [MAX_INDEXED, MAX_INDEXED + 1])))
        earlier.take_in()
    assert found[:2] == [[], []] and len(found[2]) == 1


def test_drafts_are_long_where_no_number_is_given() -> None:
    assert CONFIG.num_speculative_tokens == 16
    assert SpeculativeConfig(method="suffix", num_speculative_tokens=3).num_speculative_tokens == 3
    assert SpeculativeConfig(method="ngram").num_speculative_tokens == 5
