"""Calls on every rank: rank 0 calls a method of its own object, and each other rank the same method of its own.

    each(sender.open, ...) ─┬─> our transfer thread ─> our KVSender.open
                            └─(bytes)─> follower: `OwnCalls.run` ─> its transfer thread ─> its KVSender.open

What can be called so is a closed list of methods (`RankCalls`), each with the lane that it runs in. A method's message
is made from its signature: a struct of its parameters, typed and bounded as they are, tagged with its name. A follower
decodes the list's messages and nothing else. Answers come back as messages of their own (`rank_messages.py`); where
something waits for the ranks' last one, `Gather` counts them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from functools import partial, reduce
from operator import or_
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, get_type_hints

import msgspec

from ...common.batch import GpuEvent
from ...wire.codec import Decoder, encode
from ...wire.fields import Message

P = ParamSpec("P")
T = TypeVar("T")


class Lane(Enum):
    AT_ONCE = "at once"  # on the caller's thread
    THREAD = "thread"  # on the transfer thread, in the order of the calls
    BEHIND_PAGES = "behind pages"  # on the transfer thread, when it has heard of all pages that were computed before


class Calls(Protocol):
    """The transfer thread, as far as it is needed here."""

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run `function(*args)` on the transfer thread, in order."""
        ...

    def call_after(self, event: GpuEvent | None, function: Callable[..., None], *args: object) -> None:
        """The same once `event` has passed, in the order of these calls."""
        ...


class _Call(NamedTuple):
    """A method of the list."""

    function: Callable[..., None]
    lane: Lane
    message: type[Message]


class RankCalls:
    """A closed list of methods. No two have one name."""

    def __init__(self, lanes: Mapping[Callable[..., None], Lane]) -> None:
        self.by_name = {method.__name__: _Call(method, lane, _message_of(method)) for method, lane in lanes.items()}
        assert len(self.by_name) == len(lanes), "two methods of one name"
        messages = [call.message for call in self.by_name.values()]
        self._decoder: Decoder[Message] = Decoder(reduce(or_, messages))
        self._name_of = {call.message: name for name, call in self.by_name.items()}

    def decode(self, payload: bytes) -> tuple[str, tuple[Any, ...]]:
        """Return a method's name and its arguments. Raises ProtocolError for what is no call of the list."""
        message = self._decoder.decode(payload)
        return self._name_of[type(message)], msgspec.structs.astuple(message)


def _message_of(method: Callable[..., None]) -> type[Message]:
    """Make the message of a method: its parameters but `self`, in order."""
    hints = get_type_hints(method, include_extras=True)
    fields = [(name, hints[name]) for name in list(inspect.signature(method).parameters)[1:]]
    name, module = method.__name__, method.__module__
    made = msgspec.defstruct(name, fields, bases=(Message,), module=module, array_like=True, tag=name)
    assert issubclass(made, Message)
    return made


def _at_once(method: Callable[..., None], *args: object) -> None:
    method(*args)


def _runner(lane: Lane, thread: Calls) -> Callable[..., None]:
    """Return what runs a method with its arguments in the lane."""
    match lane:
        case Lane.AT_ONCE:
            return _at_once
        case Lane.THREAD:
            return thread.call
        case Lane.BEHIND_PAGES:
            return partial(thread.call_after, None)


class Each:
    """Rank 0's way to call a method on every rank. `broadcast` reaches the followers; None without any."""

    def __init__(self, calls: RankCalls, thread: Calls, broadcast: Callable[[bytes], None] | None) -> None:
        self._calls = {name: (call.message, _runner(call.lane, thread)) for name, call in calls.by_name.items()}
        self._broadcast = broadcast

    def __call__(self, method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a method of ours here, and that of the same name on the others. Raises KeyError if it is not listed."""
        self.bound(method)(*args, **kwargs)

    def bound(self, method: Callable[P, None]) -> Callable[P, None]:
        """Return the call of a method, made once for what is called in every step. Arguments go by their place."""
        message, run = self._calls[method.__name__]
        broadcast = self._broadcast
        if broadcast is None:
            return method if run is _at_once else partial(run, method)

        def on_each_rank(*args: P.args, **kwargs: P.kwargs) -> None:
            assert not kwargs
            broadcast(encode(message(*args)))
            run(method, *args)

        return on_each_rank


class OwnCalls:
    """A follower's end: carries out rank 0's calls on this rank."""

    def __init__(self, calls: RankCalls, thread: Calls, *owners: object) -> None:
        """`owners`: what has the listed methods, one object of each class."""
        self._calls = calls
        self._runners = {name: _runner(call.lane, thread) for name, call in calls.by_name.items()}
        self._methods: dict[str, Callable[..., None]] = {
            name: getattr(owner, name)
            for name, call in calls.by_name.items()
            for owner in owners
            if getattr(type(owner), name, None) is call.function
        }
        assert self._methods.keys() == calls.by_name.keys(), calls.by_name.keys() - self._methods.keys()

    def run(self, payload: bytes) -> None:
        name, args = self._calls.decode(payload)
        self._runners[name](self._methods[name], *args)


class Gather(Generic[T]):
    """Collects what the ranks answer, each once for a key."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._answers: dict[Hashable, list[T]] = {}

    def add(self, key: Hashable, answer: T) -> list[T] | None:
        """Return all ranks' answers with the last one, in the order in which they came; None: some are missing."""
        answers = self._answers.setdefault(key, [])
        answers.append(answer)
        return self._answers.pop(key) if len(answers) == self._num_ranks else None
