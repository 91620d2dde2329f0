"""Sampled tokens as the three forms in which the API reports log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.request import SampledToken
from ..common.tokenizer import Detokenizer, Tokenizer
from .openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
    finite,
)


def completion_logprobs(
    tokens: Sequence[SampledToken], offsets: Sequence[int], tokenizer: Tokenizer, num_top: int
) -> CompletionLogprobs:
    """`offsets` are places in the text that the client gets."""
    return CompletionLogprobs(
        text_offset=list(offsets),
        token_logprobs=[finite(token.logprob) for token in tokens],
        tokens=[tokenizer.token_text(token.token_id) for token in tokens],
        top_logprobs=[_top_by_text(token, tokenizer, num_top) for token in tokens],
    )


def _top_by_text(token: SampledToken, tokenizer: Tokenizer, num_top: int) -> dict[str, float]:
    """The best `num_top` and the chosen one. Of tokens that read the same the best one stays."""
    top: dict[str, float] = {}
    for token_id, logprob in (*token.top[:num_top], (token.token_id, finite(token.logprob))):
        top.setdefault(tokenizer.token_text(token_id), finite(logprob))
    return top


def echoed_logprobs(
    prompt_token_ids: Sequence[int], scored: Sequence[SampledToken], tokenizer: Tokenizer, num_top: int
) -> CompletionLogprobs:
    """The prompt's own tokens, as an echoed completion begins. The first token has nothing before it: null."""
    offsets, length = [], 0
    detokenizer = Detokenizer(tokenizer)
    for token_id in prompt_token_ids:
        offsets.append(length)
        length += len(detokenizer.push((token_id,)))
    rest = completion_logprobs(scored, offsets[1:], tokenizer, num_top)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None, *rest.token_logprobs],
        tokens=[tokenizer.token_text(prompt_token_ids[0]), *rest.tokens],
        top_logprobs=[None, *rest.top_logprobs],
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(tokens: Sequence[SampledToken], tokenizer: Tokenizer, num_top: int) -> ChatLogprobs:
    content = []
    for token in tokens:
        own = _top_logprob(token.token_id, token.logprob, tokenizer)
        top = [_top_logprob(token_id, logprob, tokenizer) for token_id, logprob in token.top[:num_top]]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def _top_logprob(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=finite(logprob), bytes=list(data))


def prompt_logprobs(scored: Sequence[SampledToken], tokenizer: Tokenizer, num_top: int) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: one entry for each prompt token, null for the first."""
    entries: PromptLogprobs = [None]
    for token in scored:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:num_top], 1)}
        ranked.setdefault(token.token_id, (finite(token.logprob), 0))
        entries.append(
            {
                str(token_id): PromptLogprob(
                    logprob=finite(logprob), rank=rank or None, decoded_token=tokenizer.token_text(token_id)
                )
                for token_id, (logprob, rank) in ranked.items()
            }
        )
    return entries
