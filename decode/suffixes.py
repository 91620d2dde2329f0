"""Drafts from what was said before, by a sequence itself or in answers that have ended: suffix decoding.

    an answer ends ─> `EarlierAnswers` keeps it   ─┐
    a sequence grows ─> its own n-grams           ─┴> the longest matches of its end ─> what followed most often there

Agents ask nearly the same again and again, and answers to different prompts share long parts: a prompt alone does not
have them. Of equally long matches each votes for the token that followed it; a draft goes on while its tokens are
likely by the votes, and is at most as long as its match (Oliaro et al. 2024, "SuffixDecoding", arXiv 2411.04975; vLLM's
method "suffix", whose keys these are). Here matches are looked up by their first n-gram and compared, a few of the
latest ones, in place of walking a tree.

Answers of one tenant draft for no other: how soon tokens come would tell what somebody else was answered.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice

from ..common.config import SpeculativeConfig
from ..common.request import Sequence
from .ngrams import MAX_CANDIDATES, MAX_INDEXED, NgramIndex, following, num_equal

MAX_TOKENS = 1 << 18  # of earlier answers: some 40 MB
_BORDER = -1  # between answers; no token


class EarlierAnswers:
    """The latest answers' tokens in a ring, each n-gram chained to its occurrence before.

    A place is the number of tokens that were ever written before it; what is `max_tokens` behind the end is gone.
    """

    def __init__(self, ngram: int, max_answers: int, max_tokens: int = MAX_TOKENS) -> None:
        self._ngram, self._max_answers = ngram, max_answers
        self._tokens = array("i", [_BORDER]) * max_tokens
        self._keys = array("q", [0]) * max_tokens  # of the n-gram that ends before a place
        self._earlier = array("q", [0]) * max_tokens  # place after the same n-gram before; 0: none
        self._latest: dict[int, int] = {}  # key -> the place after its latest n-gram
        self._starts: deque[int] = deque()
        self._end = self._oldest = 1
        self._waiting: deque[tuple[bytes, Tokens[int]]] = deque()
        self._num_written = 0  # tokens of the first of these

    def add(self, owner: bytes, tokens: Tokens[int]) -> None:
        """Keep an answer, with what led to it, from `take_in` on. Of a very long one only the end remains."""
        if len(tokens) > self._ngram and self._max_answers:
            self._waiting.append((owner, tokens))

    def take_in(self, most: int = MAX_INDEXED) -> None:
        """Write up to so many tokens of answers that wait: a long one at once would hold up a step of all sequences."""
        while self._waiting and most > 0:
            owner, tokens = self._waiting[0]
            first, last = self._num_written, min(len(tokens), self._num_written + most)
            if first == 0:
                self._begin()
            for end in range(first + 1, last + 1):
                key = self._key(owner, tokens[end - self._ngram : end]) if end >= self._ngram else 0
                self._append(tokens[end - 1], key)
            most -= last - first
            self._num_written = last
            if last == len(tokens):
                self._waiting.popleft()
                self._num_written = 0

    def _begin(self) -> None:
        """Begin an answer, and forget the oldest one where there are too many."""
        self._starts.append(self._end)
        if len(self._starts) > self._max_answers:
            self._starts.popleft()
            self._oldest = self._starts[0]
        self._append(_BORDER, 0)

    def _append(self, token: int, key: int) -> None:
        """Write a token; `key`: of the n-gram that ends with it, 0: none does."""
        slot = self._end % len(self._tokens)
        if self._latest.get(gone := self._keys[slot]) == self._end + 1 - len(self._tokens):
            del self._latest[gone]
        self._tokens[slot] = token
        self._end += 1
        self._keys[slot] = key
        if key:
            self._earlier[slot] = self._latest.get(key, 0)
            self._latest[key] = self._end

    def places(self, owner: bytes, tokens: Tokens[int]) -> Iterator[int]:
        """Yield the places after what the tokens end with, an n-gram, the latest first; seldom others of its key."""
        place = self._latest.get(self._key(owner, tokens[-self._ngram :]), 0) if len(tokens) >= self._ngram else 0
        while place >= self._first + self._ngram:  # all of it is kept
            yield place
            place = self._earlier[(place - 1) % len(self._tokens)]

    def before(self, place: int, count: int) -> list[int]:
        """Return the tokens that stand before a place, `count` of them or as many as are kept; below 0: a border."""
        return self._slice(max(place - count, self._first), place)

    def behind(self, place: int, count: int) -> list[int]:
        """Return what follows there, up to `count` tokens or the end of the answer."""
        tokens = self._slice(place, min(place + count, self._end))
        return tokens[: tokens.index(_BORDER)] if _BORDER in tokens else tokens

    def _slice(self, first: int, end: int) -> list[int]:
        size = len(self._tokens)
        start, stop = first % size, first % size + max(0, end - first)
        return (self._tokens[start:stop] + self._tokens[: max(0, stop - size)]).tolist()

    @property
    def _first(self) -> int:
        return max(self._oldest, self._end - len(self._tokens))

    @staticmethod
    def _key(owner: bytes, ngram: Tokens[int]) -> int:
        return hash((owner, *ngram)) or 1


class SuffixProposer:
    """`SuffixProposer` drafts for one sequence. Implements `Proposer`."""

    def __init__(self, config: SpeculativeConfig, earlier: EarlierAnswers, owner: bytes) -> None:
        self._min, self._max = config.prompt_lookup_min, config.suffix_decoding_max_tree_depth
        self._factor, self._least = config.suffix_decoding_max_spec_factor, config.suffix_decoding_min_token_prob
        self._earlier, self._owner = earlier, owner
        self._index = NgramIndex(self._min)

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        end = list(tokens[-self._max :])
        own, others = self._places(self._index.places(tokens)), self._places(self._earlier.places(self._owner, tokens))
        of_own = [num_equal(tokens[max(0, place - self._max) : place], end) for place in own]
        of_others = [num_equal(self._earlier.before(place, self._max), end) for place in others]
        longest = max((*of_own, *of_others), default=0)
        most = min(num_tokens, int(self._factor * longest))
        if longest < self._min or most <= 0:
            return ()
        longest_own = [place for place, length in zip(own, of_own, strict=True) if length == longest]
        longest_others = [place for place, length in zip(others, of_others, strict=True) if length == longest]
        followed = [following(tokens, place, most) for place in longest_own]
        return self._elected([*followed, *(self._earlier.behind(place, most) for place in longest_others)], most)

    @staticmethod
    def _places(places: Iterator[int]) -> list[int]:
        return list(islice(places, MAX_CANDIDATES))

    def _elected(self, voters: list[list[int]], most: int) -> tuple[int, ...]:
        """Return what followed most often, token by token, while that is likely. Each voter is what followed once."""
        draft, chance = list[int](), 1.0
        while len(draft) < most and voters:
            place = len(draft)
            if voters.count(voters[0]) == len(voters):
                return (*draft, *voters[0][place:])
            votes = Counter([voter[place] for voter in voters if place < len(voter)])
            token = max(votes, key=votes.__getitem__)  # of equally many the first: the latest of its own
            chance *= votes[token] / len(voters)
            if chance < self._least:
                break
            draft.append(token)
            voters = [voter for voter in voters if place < len(voter) and voter[place] == token]
        return tuple(draft)


def owner_of(seq: Sequence) -> bytes:
    """Return whose answers a sequence may hear of: its tenant's, of the same adapter."""
    return seq.adapter.encode() + b"\0" + seq.cache_salt


def said(seq: Sequence, depth: int) -> Tokens[int]:
    """Return a sequence's answer, and of its prompt what led to it."""
    return seq.token_ids[max(0, seq.num_prompt_tokens - depth) :] if seq.num_output_tokens else ()
