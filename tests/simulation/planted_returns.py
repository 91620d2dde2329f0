"""Planted bugs of requests that go on behind what their clients have, after a router's death."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvferry.common.request import SampledToken
from kvferry.router.state.choice_state import ChoiceState
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import TokenStream

from .planting import Planted

_begin = TokenStream.__init__


def _begin_from_the_start(
    self: TokenStream, request: RouterRequest, on_abort: Callable[[], None], on_finish_choice: Callable[[int], None]
) -> None:
    """The stream yields what its reader has."""
    _begin(self, request, on_abort, on_finish_choice)
    self._sent = [0] * request.n


def _restore_all_but_the_last(self: ChoiceState, tokens: Sequence[SampledToken], finish: str | None) -> None:
    self.tokens.extend(tokens[:-1])
    self.finish = finish


def _restore_no_end(self: ChoiceState, tokens: Sequence[SampledToken], finish: str | None) -> None:
    self.tokens.extend(tokens)


BUGS = (
    Planted(
        "a client that comes back is told everything again",
        frozenset({"I6"}),
        patches=((TokenStream, "__init__", _begin_from_the_start),),
    ),
    Planted(
        "the last token that a client has is not known any more",
        frozenset({"I6"}),
        patches=((ChoiceState, "restore", _restore_all_but_the_last),),
    ),
    Planted(
        "a choice that had ended goes on when its client comes back",
        frozenset({"I6"}),
        patches=((ChoiceState, "restore", _restore_no_end),),
        within_seeds=300,
    ),
)
