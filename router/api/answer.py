"""The answer to one API call: the streams of its prompts, merged, as pieces of text for each choice.

    prompt i, choice j  ->  index i * n + j

    next ─> pieces        for every answer; what is kept of it from before comes first
    write_to ─> text      for one plain choice in its middle: at the end of the loop's turn, and `next` goes on waiting

Whoever reads asks for what is `next` until there is nothing more. That is so after every choice has a finish reason;
every other end raises: no answer ends in silence. This module knows no HTTP and no format.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ...common.clock import Clock
from ...common.request import SampledToken
from ...models.tokenizer import Detokenizer, Tokenizer
from ..kept.kept_answer import KeptAnswer
from ..state.choice_state import is_natural
from ..state.errors import StreamError
from ..state.request import RouterRequest
from ..state.token_stream import ChoiceUpdate, TokenStream
from .choice import ChoiceText, TextOptions, TextPiece

_TOKENS_AT_ONCE = 64  # what has piled up, in many choices or for a client that reads slowly, is not told in one go


@dataclass(slots=True, frozen=True)
class PromptText:
    """One prompt as it came; `text` where it came as text."""

    token_ids: list[int]
    text: str | None = None


class GapObserver(Protocol):
    def on_token_gap(self, gap_s: float) -> None:
        """Seconds between two updates of one choice."""
        ...


class _NoGaps:
    """Counts nothing: of an answer that nobody waits for."""

    def on_token_gap(self, gap_s: float) -> None: ...


NO_GAPS = _NoGaps()


class FastWriter(Protocol):
    """A way on which text leaves by itself."""

    @property
    def is_full(self) -> bool: ...

    def before_end(self, call: Callable[[], None]) -> None:
        """Call this at the end of the loop's turn."""
        ...

    def write(self, text: str) -> None: ...


class Answer:
    """`Answer` owns the streams until they have ended or `close` is called."""

    def __init__(
        self,
        streams: Sequence[TokenStream],
        prompts: Sequence[PromptText],
        options: TextOptions,
        tokenizer: Tokenizer,
        *,
        clock: Clock,
        observer: GapObserver,
        kept: KeptAnswer | None = None,
    ) -> None:
        """`kept`: where it is kept while it is told; closed with the answer."""
        assert len(streams) == len(prompts)
        self.streams = streams
        self.prompts = prompts
        self.num_choices = streams[0].request.n  # for each prompt
        skips, shown = options.skip_special_tokens, options.shown_tokens
        begun = [Detokenizer(tokenizer, prompt.token_ids, skips, shown) for prompt in prompts]
        self.choices = [ChoiceText(text.fork(), options) for text in begun for _ in range(self.num_choices)]
        self._last_update_s: list[float | None] = [None] * len(self.choices)
        self._open = set(range(len(streams)))  # positions of the streams that have not ended
        self._changed = dict.fromkeys(self._open)  # since they were looked at, in that order
        self._is_behind = False  # more was there than is told at once
        self._error: StreamError | None = None  # after the pieces that were told last
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None  # for a change
        self._fast_writer: FastWriter | None = None
        self._is_write_due = False  # at the end of this turn
        for position, stream in enumerate(streams):
            stream.listen(partial(self._on_change, position))
        self._clock = clock
        self._observer = observer
        self.kept = kept
        self._num_repeated = 0  # portions that were told before and are told again

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

    @property
    def is_repeating(self) -> bool:
        """True until all that was told before is told again."""
        return self.kept is not None and self._num_repeated < len(self.kept.told)

    async def next(self) -> list[tuple[int, TextPiece]]:
        """(index, piece) of what has come; waits until something has. Empty: the answer has ended.

        The first piece of each choice may be empty, as a sign of life; no other is.
        """
        if self._error is not None:
            raise self._error
        if self._is_behind:
            await asyncio.sleep(0)  # others first: much has piled up here
            self._is_behind = False
        while self.is_repeating:
            if pieces := self._repeat():
                return pieces
        while self._open or self._changed:
            if not self._changed:
                self._waiter = self._loop.create_future()
                await self._waiter
            pieces = self._take_ready()
            if pieces:
                return pieces
        if not self.is_finished:
            raise StreamError("the answer ended before all of its choices had", "internal_error", 500)
        return []

    def write_to(self, fast_writer: FastWriter) -> None:
        """Let the text of the one choice go there while `next` waits, from now on: its first piece was told."""
        if len(self.choices) == 1 and self.choices[0].is_plain and self.kept is None:
            self._fast_writer = fast_writer

    def _on_change(self, position: int) -> None:
        self._changed[position] = None
        if self._waiter is None or self._waiter.done() or self._is_write_due:
            return
        if self._fast_writer is not None:
            self._is_write_due = True
            self._fast_writer.before_end(self._write_middle)
        else:
            self._waiter.set_result(None)

    def _write_middle(self) -> None:
        """Write the plain middle of an answer; all else is left to who waits, and so is what goes wrong."""
        self._is_write_due = False
        waiter, fast_writer = self._waiter, self._fast_writer
        assert waiter is not None and fast_writer is not None
        if waiter.done():
            return
        tokens = () if fast_writer.is_full else self.streams[0].middle(_TOKENS_AT_ONCE)
        if not tokens or not self._has_written(fast_writer, tokens):
            waiter.set_result(None)

    def _has_written(self, fast_writer: FastWriter, tokens: Sequence[SampledToken]) -> bool:
        try:
            text = self.choices[0].push(tokens, None).text
        except Exception:  # whoever waits gets it again
            return False
        self.streams[0].skip(len(tokens))
        self._changed.clear()
        self._note_gap(0, self._clock.now())
        if text:
            fast_writer.write(text)
        return True

    def _take_ready(self) -> list[tuple[int, TextPiece]]:
        """Take what the changed streams have, in the order of their changes, up to so many tokens in all."""
        pieces: list[tuple[int, TextPiece]] = []
        now_s, most = self._clock.now(), _TOKENS_AT_ONCE
        try:
            while self._changed and most > 0:
                position = next(iter(self._changed))
                stream = self.streams[position]
                for update in stream.take(most):
                    most -= len(update.tokens) or 1
                    item = self._take(position, update, now_s)
                    if item is not None:
                        pieces.append(item)
                if most > 0:
                    del self._changed[position]
                    if stream.is_exhausted():
                        self._open.discard(position)
        except StreamError as error:
            if not pieces:
                raise
            self._error = error  # what came before it is told first
        self._is_behind = most <= 0
        return pieces

    def _repeat(self) -> list[tuple[int, TextPiece]]:
        """Take the next portion that was told before, alone: what is told with it counts tokens up to there."""
        assert self.kept is not None
        portion = self.kept.told[self._num_repeated]
        self._num_repeated += 1
        self._is_behind = self._num_repeated % _TOKENS_AT_ONCE == 0
        choice, is_first = self.choices[portion.index], self._last_update_s[portion.index] is None
        if choice.finish is not None:
            return []
        self._last_update_s[portion.index] = self._clock.now()
        piece = choice.push(portion.tokens, portion.finish)
        if piece.finish is not None:  # at a stop string: nobody computes on
            self.stream_of(portion.index).finish_choice(portion.index % self.num_choices)
        return [(portion.index, piece)] if _is_told(piece, is_first=is_first) else []

    def _take(self, position: int, update: ChoiceUpdate, now_s: float) -> tuple[int, TextPiece] | None:
        """Return what an update adds; None where there is nothing to tell."""
        index = position * self.num_choices + update.choice
        choice = self.choices[index]
        if choice.finish is not None:
            return None
        is_first, finish = self._note_gap(index, now_s), _natural(update)
        if self.kept is not None:
            self.kept.add(index, update.tokens, finish)
        piece = choice.push(update.tokens, finish)
        if piece.finish is not None and update.finish is None:
            self.streams[position].finish_choice(update.choice)
            if self.kept is not None:
                self.kept.add(index, (), piece.finish)
        return (index, piece) if _is_told(piece, is_first=is_first) else None

    def close(self) -> None:
        """Nobody reads any more. What has not ended is aborted. Idempotent."""
        is_cut = not self.is_finished
        for stream in self.streams:
            stream.listen(_ignore)  # else they would hold each other, and wait for a collection of garbage
            if is_cut:
                stream.abort()
        if self.kept is not None:
            self.kept.close()

    def _note_gap(self, index: int, now_s: float) -> bool:
        """Note the time since a choice's last update, and return whether this is its first one."""
        last_s, self._last_update_s[index] = self._last_update_s[index], now_s
        if last_s is None:
            return True
        self._observer.on_token_gap(now_s - last_s)
        return False


def _is_told(piece: TextPiece, *, is_first: bool) -> bool:
    return bool(piece.text) or piece.finish is not None or is_first


def _ignore() -> None:
    """A change that nobody waits for."""


def _natural(update: ChoiceUpdate) -> str | None:
    """A finish reason that a client may see."""
    if update.finish is None or is_natural(update.finish):
        return update.finish
    raise StreamError(f"the request was ended by the server ({update.finish})", "request_aborted", 503)
