"""/v1/completions: an answer in the form of a text completion."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .choice import TextPiece
from .form import Form, FormContext
from .logprobs import completion_logprobs, echoed_logprobs, joined
from .openai_types import Completion, CompletionChoice, CompletionLogprobs, Struct


class CompletionForm(Form):
    def __init__(self, context: FormContext) -> None:
        self._context = context
        self._options = context.options
        self._echoed: dict[int, str] = {}  # by prompt: a prompt of token ids is decoded once
        self._scored: dict[int, CompletionLogprobs] = {}  # by prompt: its choices share what is said of it

    @property
    def has_plain_chunks(self) -> bool:
        return self._options.has_plain_chunks

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Struct]:
        chunks: list[Struct] = []
        if is_first and (self._options.echo or self._options.return_token_ids):
            chunks.append(self._context.chunk(Completion, self._prompt_choice(index)))
        if piece.text or piece.finish is not None:
            chunks.append(self._context.chunk(Completion, self._choice(index, piece)))
        return chunks

    def usage_chunk(self) -> Struct:
        return self._context.body(Completion, [], self._context.usage())

    def whole(self, pieces: Sequence[TextPiece]) -> Struct:
        choices: list[CompletionChoice] = []
        for index in self._shown(pieces):
            piece = pieces[index]
            choice = self._choice(index, piece)
            choice.index = len(choices)
            if self._options.echo:
                choice.text = self._echoed_text(index) + choice.text
                echoed = self._echoed_logprobs(index)
                if echoed is not None and choice.logprobs is not None:
                    choice.logprobs = joined(echoed, choice.logprobs)
            choice.prompt_token_ids = self._context.prompt_ids(index)
            choice.prompt_logprobs = self._context.prompt_logprobs(index)
            choices.append(choice)
        return self._context.body(Completion, choices, self._context.usage())

    def _shown(self, pieces: Sequence[TextPiece]) -> Sequence[int]:
        """Return which choices are shown: of each prompt those that the model finds likeliest, by the token."""
        num_best, num_choices = self._options.num_best, self._context.answer.num_choices
        if num_best is None:
            return range(len(pieces))
        shown: list[int] = []
        for start in range(0, len(pieces), num_choices):
            ranked = sorted(range(start, start + num_choices), key=lambda index: -_mean_logprob(pieces[index]))
            shown += ranked[:num_best]
        return shown

    def _choice(self, index: int, piece: TextPiece) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=self._logprobs(index, piece),
            finish_reason=piece.finish,
            stop_reason=piece.stop_reason,
            token_ids=self._context.token_ids(piece),
        )

    def _prompt_choice(self, index: int) -> CompletionChoice:
        """Return what a stream says of the prompt before the first token of a choice."""
        return CompletionChoice(
            index=index,
            text=self._echoed_text(index) if self._options.echo else "",
            logprobs=self._echoed_logprobs(index) if self._options.echo else None,
            prompt_token_ids=self._context.prompt_ids(index),
        )

    def _logprobs(self, index: int, piece: TextPiece) -> CompletionLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        base = len(self._echoed_text(index)) if self._options.echo else 0
        offsets = [base + offset for offset in piece.offsets]
        return completion_logprobs(piece.tokens, offsets, self._context.token_name, self._options.num_logprobs)

    def _echoed_text(self, index: int) -> str:
        position = index // self._context.answer.num_choices
        if position not in self._echoed:
            prompt, tokenizer = self._context.answer.prompts[position], self._context.tokenizer
            text = prompt.text
            if text is None:
                text = tokenizer.decode(prompt.token_ids, self._options.skip_special_tokens)
            self._echoed[position] = text
        return self._echoed[position]

    def _echoed_logprobs(self, index: int) -> CompletionLogprobs | None:
        if self._options.num_logprobs is None:
            return None
        position, num_top = index // self._context.answer.num_choices, self._options.num_logprobs
        if position not in self._scored:
            context, text = self._context, self._echoed_text(index)
            ids, scored = context.answer.prompt_of(index).token_ids, context.answer.stream_of(index).prompt_logprobs
            self._scored[position] = echoed_logprobs(ids, text, scored, context.tokenizer, context.token_name, num_top)
        return self._scored[position]


def _mean_logprob(piece: TextPiece) -> float:
    """Return a choice's log probability per token."""
    found = [token.logprob for token in piece.tokens if token.logprob is not None]
    return sum(found) / len(found) if found else -math.inf
