"""The answer to one API call: the streams of its prompts, merged, as pieces of text for each choice.

    prompt i, choice j  ->  index i * n + j

`pieces` is read once. It ends after every choice has a finish reason and raises in every other case: no answer ends
in silence. This module knows no HTTP and no format.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..common.clock import Clock
from ..common.tokenizer import Detokenizer, Tokenizer
from .choice import ChoiceText, Piece, TextOptions
from .request import ChoiceUpdate, RouterRequest, StreamError, TokenStream, is_natural

_MERGED_UPDATES = 64  # read ahead of the client over all prompts of a batch
_PIECE_TOKENS = 64  # at most in one piece: what has piled up for a client that reads slowly is not written in one go


@dataclass(slots=True, frozen=True)
class PromptText:
    """One prompt as it came; `text` where it came as text."""

    token_ids: list[int]
    text: str | None = None


class GapObserver(Protocol):
    def on_token_gap(self, gap_s: float) -> None:
        """Seconds between two updates of one choice."""
        ...


class Answer:
    """Owns the streams until they have ended or `abort` is called."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        prompts: Sequence[PromptText],
        options: TextOptions,
        tokenizer: Tokenizer,
        *,
        clock: Clock,
        observer: GapObserver,
    ) -> None:
        assert len(streams) == len(prompts)
        self.streams = streams
        self.prompts = prompts
        self.num_choices = streams[0].request.n  # for each prompt
        self.choices = [
            ChoiceText(Detokenizer(tokenizer, prompt.token_ids, options.skip_special_tokens), options)
            for prompt in prompts
            for _ in range(self.num_choices)
        ]
        self._last_update_s: list[float | None] = [None] * len(self.choices)
        self._clock = clock
        self._observer = observer

    def prompt_of(self, index: int) -> PromptText:
        return self.prompts[index // self.num_choices]

    def stream_of(self, index: int) -> TokenStream:
        return self.streams[index // self.num_choices]

    @property
    def requests(self) -> list[RouterRequest]:
        return [stream.request for stream in self.streams]

    @property
    def is_finished(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index, piece) as they come. The first of each choice may be empty, as a sign of life; no other is."""
        if len(self.streams) == 1:
            async for update in self.streams[0]:
                for number, part in enumerate(_parts(update)):
                    if number:
                        await asyncio.sleep(0)  # others first: much has piled up here
                    item = self._take(0, part)
                    if item is not None:
                        yield item
        else:
            async with contextlib.aclosing(_merged(self.streams)) as merged:
                async for position, update in merged:
                    for number, part in enumerate(_parts(update)):
                        if number:
                            await asyncio.sleep(0)
                        item = self._take(position, part)
                        if item is not None:
                            yield item
        if not self.is_finished:
            raise StreamError("the answer ended before all of its choices had", "internal_error", 500)

    def _take(self, position: int, update: ChoiceUpdate) -> tuple[int, Piece] | None:
        """What an update adds; None where there is nothing to tell."""
        index = position * self.num_choices + update.choice
        choice = self.choices[index]
        if choice.finish is not None:
            return None
        is_first = self._note_gap(index)
        piece = choice.push(update.tokens, _natural(update))
        if piece.finish is not None and update.finish is None:
            self.streams[position].finish_choice(update.choice)
        return (index, piece) if piece.text or piece.finish is not None or is_first else None

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()

    def _note_gap(self, index: int) -> bool:
        now = self._clock.now()
        last, self._last_update_s[index] = self._last_update_s[index], now
        if last is None:
            return True
        self._observer.on_token_gap(now - last)
        return False


def _parts(update: ChoiceUpdate) -> Sequence[ChoiceUpdate]:
    """The same tokens in order; the finish reason comes with the last of them."""
    if len(update.tokens) <= _PIECE_TOKENS:
        return (update,)
    starts = range(0, len(update.tokens), _PIECE_TOKENS)
    return [
        ChoiceUpdate(
            update.choice,
            update.tokens[start : start + _PIECE_TOKENS],
            update.finish if start == starts[-1] else None,
        )
        for start in starts
    ]


def _natural(update: ChoiceUpdate) -> str | None:
    """A finish reason that a client may see."""
    if update.finish is None or is_natural(update.finish):
        return update.finish
    raise StreamError(f"the request was ended by the server ({update.finish})", "request_aborted", 503)


async def _merged(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, ChoiceUpdate], None]:
    """The updates of all streams in the order in which they come; the first error ends it."""
    queue: asyncio.Queue[tuple[int, ChoiceUpdate] | Exception | None] = asyncio.Queue(_MERGED_UPDATES)

    async def read(position: int, stream: TokenStream) -> None:
        try:
            async for update in stream:
                await queue.put((position, update))
        except Exception as error:  # handed to the reader below
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(read(position, stream)) for position, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
