"""Sampled tokens as the three forms in which the API reports log probabilities.

A token is named by its text, or by its id where the client asks for that: of a completion's `top_logprobs`, which are
keyed by name, several tokens that read the same leave one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...common.request import SampledToken
from ...models.tokenizer import Detokenizer, Tokenizer
from .openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
    finite,
)

Name = Callable[[int], str]
_LEAST = finite(None)


def token_names(tokenizer: Tokenizer, *, as_ids: bool) -> Name:
    """Return what names a token: its text, or its id as vLLM writes it (`token_id:123`)."""
    return "token_id:{}".format if as_ids else tokenizer.token_text


def completion_logprobs(
    tokens: Sequence[SampledToken], offsets: Sequence[int], name: Name, num_top: int
) -> CompletionLogprobs:
    """`offsets` are places in the text that the client gets."""
    return CompletionLogprobs(
        text_offset=list(offsets),
        token_logprobs=[finite(token.logprob) for token in tokens],
        tokens=[name(token.token_id) for token in tokens],
        top_logprobs=[_top_by_name(token, name, num_top) for token in tokens],
    )


def _top_by_name(token: SampledToken, name: Name, num_top: int) -> dict[str, float]:
    """The chosen one first, as vLLM has it, then the best `num_top`. Of tokens with the same name the best counts."""
    top = {name(token.token_id): finite(token.logprob)}
    for token_id, logprob in token.top[:num_top]:
        own = name(token_id)
        top[own] = max(top.get(own, _LEAST), finite(logprob))
    return top


def echoed_logprobs(
    prompt_token_ids: Sequence[int],
    text: str,
    scored: Sequence[SampledToken],
    tokenizer: Tokenizer,
    name: Name,
    num_top: int,
) -> CompletionLogprobs:
    """The prompt's own tokens, as an echoed completion begins with its `text`. Nothing is before the first: null."""
    offsets, length = [], 0
    detokenizer = Detokenizer(tokenizer)
    for token_id in prompt_token_ids:
        offsets.append(length)
        shown = detokenizer.push((token_id,))
        if token_id in tokenizer.special_ids and text.startswith(spelled := tokenizer.token_text(token_id), length):
            shown = spelled  # by the client: those that the model wants around a text are not in it
        length += len(shown)
    rest = completion_logprobs(scored, offsets[1:], name, num_top)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None, *rest.token_logprobs],
        tokens=[name(prompt_token_ids[0]), *rest.tokens],
        top_logprobs=[None, *rest.top_logprobs],
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(tokens: Sequence[SampledToken], tokenizer: Tokenizer, name: Name, num_top: int) -> ChatLogprobs:
    content = []
    for token in tokens:
        own = _top_logprob(token.token_id, token.logprob, tokenizer, name)
        top = [_top_logprob(token_id, logprob, tokenizer, name) for token_id, logprob in token.top[:num_top]]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def _top_logprob(token_id: int, logprob: float | None, tokenizer: Tokenizer, name: Name) -> TopLogprob:
    return TopLogprob(token=name(token_id), logprob=finite(logprob), bytes=list(tokenizer.token_bytes(token_id)))


def prompt_logprobs(scored: Sequence[SampledToken], tokenizer: Tokenizer, num_top: int) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: one entry for each prompt token, null for the first.

    The prompt's own token stands first, where clients look for it, then the best in their order. These are ranked as
    they come; of tokens that are as likely as the last of them, the prompt's own is ranked behind.
    """
    entries: PromptLogprobs = [None]
    for token in scored:
        best = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:num_top], 1)}
        own = best.get(token.token_id, (finite(token.logprob), token.rank))
        ranked = {token.token_id: own, **best}
        entries.append(
            {
                str(token_id): PromptLogprob(
                    logprob=finite(logprob), rank=rank or None, decoded_token=tokenizer.token_text(token_id)
                )
                for token_id, (logprob, rank) in ranked.items()
            }
        )
    return entries
