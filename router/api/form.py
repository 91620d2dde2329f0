"""The two endpoints have this in common when they put an answer into OpenAI's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from msgspec import UNSET, UnsetType

from ...models.tokenizer import Tokenizer
from .answer import Answer
from .choice import TextPiece
from .logprobs import Name, prompt_logprobs, token_names
from .openai_types import CompletionTokensDetails, PromptLogprobs, PromptTokensDetails, Struct, Usage

AnswerBody = TypeVar("AnswerBody", bound=Struct)
ChunkUsage = Usage | UnsetType | None


@dataclass(slots=True, frozen=True)
class FormOptions:
    """The things that a client asked to see."""

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True  # in the echo of token ids: a text is echoed as it is
    return_token_ids: bool = False
    names_tokens_by_id: bool = False
    num_best: int | None = None  # choices of each prompt that are shown, the best ones; None: all
    include_usage: bool = False  # of a stream
    continuous_usage: bool = False  # of a stream: in every chunk

    @property
    def has_plain_chunks(self) -> bool:
        """True where nothing but the text changes between a choice's first chunk and its last."""
        return not self.continuous_usage and self.num_logprobs is None and not self.return_token_ids


@dataclass(slots=True, frozen=True)
class FormContext:
    """One answer and how it is to be shown."""

    answer_id: str
    created: int
    model: str
    fingerprint: str
    answer: Answer
    tokenizer: Tokenizer
    options: FormOptions

    @property
    def token_name(self) -> Name:
        """The function that names tokens where log probabilities are reported."""
        return token_names(self.tokenizer, as_ids=self.options.names_tokens_by_id)

    def token_ids(self, piece: TextPiece) -> list[int] | UnsetType:
        return [token.token_id for token in piece.tokens] if self.options.return_token_ids else UNSET

    def prompt_ids(self, index: int) -> list[int] | UnsetType:
        """Return the tokens of a choice's prompt."""
        return self.answer.prompt_of(index).token_ids if self.options.return_token_ids else UNSET

    def prompt_logprobs(self, index: int) -> PromptLogprobs | UnsetType:
        """Return the log probabilities of a choice's prompt."""
        if self.options.num_prompt_logprobs is None:
            return UNSET
        scored = self.answer.stream_of(index).prompt_logprobs
        return prompt_logprobs(scored, self.tokenizer, self.options.num_prompt_logprobs)

    def body(self, kind: Callable[..., AnswerBody], choices: Sequence[Struct], usage: ChunkUsage) -> AnswerBody:
        """Return the body of an answer or of a chunk, around its choices."""
        return kind(
            id=self.answer_id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=usage,
        )

    def chunk(self, kind: Callable[..., AnswerBody], choice: Struct) -> AnswerBody:
        return self.body(kind, [choice], self.chunk_usage())

    def usage(self) -> Usage:
        """Return the usage of the whole call, as far as it has got."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.answer.prompts)
        num_completion = sum(choice.num_tokens for choice in self.answer.choices)
        num_cached = sum(request.num_cached_tokens for request in self.answer.requests)
        counts = [choice.num_reasoning_tokens for choice in self.answer.choices]
        reasoned = None if None in counts else CompletionTokensDetails(reasoning_tokens=sum(filter(None, counts)))
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
            completion_tokens_details=UNSET if reasoned is None else reasoned,
        )

    def chunk_usage(self) -> ChunkUsage:
        """Return the usage in a stream's chunk: as asked for, null where only the last one tells, else absent."""
        if self.options.continuous_usage:
            return self.usage()
        return None if self.options.include_usage else UNSET


class Form(Protocol):
    """One endpoint's words. `chunks` is asked once for each piece, `whole` once with every choice's joined pieces."""

    @property
    def has_plain_chunks(self) -> bool:
        """True where no later piece that goes on with its choice need be asked for: only the text differs."""
        return False

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> Sequence[object]: ...

    def usage_chunk(self) -> object:
        """Return the last chunk of a stream whose client asks for its usage by `stream_options`."""
        raise AssertionError("only OpenAI's older endpoints have them")

    def whole(self, pieces: Sequence[TextPiece]) -> object: ...

    def keep(self) -> None:
        """Let what `whole` told be found again, where its kind is: on the loop, while `whole` may run on any thread."""
        return None
