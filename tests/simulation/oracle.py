"""What every answer must be: a pure function of the request, whatever happens to it.

The tag of a position is a hash of tenant, adapter and every token up to it, as its keys and values depend on them all.
The token after it is a function of that tag, the seed, the choice and the index. An engine that finds the right tags
in its pages therefore samples the right token, and one that finds any other has read what it must not.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvferry.common.request import Pooling, SampledToken, SamplingParams
from kvferry.common.vectors import unit

VOCAB_SIZE = 64
EOS = 0
_NUM_CLASSES = 4  # of tokens, of which a grammar lets one come
_TOKENS = tuple(SampledToken(token_id) for token_id in range(VOCAB_SIZE))


def sampled(token_id: int) -> SampledToken:
    return _TOKENS[token_id]


def next_state(state: int, token: int) -> int:
    """A grammar's state after one more token."""
    return (31 * state + token + 1) % 4093


def allowed_after(state: int) -> range:
    """The tokens that may come next: after some, a single one."""
    single = state % VOCAB_SIZE
    if state % 3 == 0 and single != EOS:
        return range(single, single + 1)
    return range(state % _NUM_CLASSES, VOCAB_SIZE, _NUM_CLASSES)


@dataclass(slots=True)
class Answer:
    """One choice: its tokens, prompt first, to the end that the worker gives it, and the tag of each position."""

    tokens: list[int]
    tags: list[int]
    num_prompt_tokens: int
    finish: str
    prompt_logprobs: tuple[SampledToken, ...] = ()  # entry i is about prompt token i + 1
    allowed: tuple[range, ...] = ()  # with a grammar: the tokens that may come at each index of the output

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


def answer(
    prompt: Sequence[int],
    prompt_tags: list[int],
    sampling: SamplingParams,
    choice: int,
    max_model_len: int,
    grammar: int | None = None,
) -> Answer:
    """What a choice yields if nobody stops it. `grammar`: the state in which its grammar begins."""
    allowed: list[range] = []
    tokens, tags = list(prompt), list(prompt_tags)
    num_prompt, finish = len(tokens), "stop"
    while True:
        number = len(tokens) - num_prompt  # of tokens that there are
        token = hash((tags[-1], sampling.seed, choice, number)) % VOCAB_SIZE
        if grammar is not None:
            allowed.append(allowed_after(grammar))
            # An end may come late, or not at all: then another token does.
            may_end = number >= sampling.min_tokens and not sampling.ignore_eos
            fitting = [each for each in allowed[-1] if each != EOS or may_end]
            token = fitting[token % len(fitting)]
            grammar = next_state(grammar, token)
        tokens.append(token)
        tags.append(hash((tags[-1], token)))
        number += 1
        if token == EOS and (grammar is not None or (number >= sampling.min_tokens and not sampling.ignore_eos)):
            break
        if number == sampling.max_tokens or len(tokens) >= max_model_len:
            finish = "length"
            break
    scores = tuple(SampledToken(tokens[i + 1], -float(tags[i] % 1000)) for i in range(num_prompt - 1))
    return Answer(tokens, tags, num_prompt, finish, scores, tuple(allowed))


def tags_of(tokens: Sequence[int], tenant: int, adapter: int = 0) -> list[int]:
    """The tag of each position of a prompt."""
    tag, tags = hash((tenant, 1 + adapter)), []
    for token in tokens:
        tag = hash((tag, token))
        tags.append(tag)
    return tags


def state_of(tags: Iterable[int]) -> bytes:
    """Return the sum of the hidden states at positions with these tags: whole numbers, so that it is exact."""
    states = [(1 + tag % 61, tag // 61 % 53, tag // 3233 % 47) for tag in tags]
    return array("f", map(sum, zip(*states, strict=True))).tobytes() if states else b""


def embedding(tags: Sequence[int], pooling: Pooling) -> bytes:
    """Return what a prompt with these tags is embedded as."""
    pooled = {Pooling.LAST: tags[-1:], Pooling.CLS: tags[:1], Pooling.MEAN: tags}[pooling]
    vector = unit(state_of(pooled))
    assert vector is not None
    return vector


class Oracle:
    """The answers of one request."""

    __slots__ = ("answers", "embedding", "request_id")

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        tenant: int,
        sampling: SamplingParams,
        n: int,
        max_model_len: int,
        grammar: int | None = None,
        pooling: Pooling | None = None,
        adapter: int = 0,
    ) -> None:
        self.request_id = request_id
        tags = tags_of(prompt, tenant, adapter)
        self.embedding = b"" if pooling is None else embedding(tags, pooling)
        self.answers = [answer(prompt, tags, sampling, choice, max_model_len, grammar) for choice in range(n)]
