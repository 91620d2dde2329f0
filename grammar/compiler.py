"""A worker's grammars: compiled on threads of their own, kept for the requests that come with them again.

    get ─> known: at once
       └─> new: queued ─> [thread] vocabulary, source, first mask ─> ready or failed ─> on_ready

The library releases the GIL, so steps go on meanwhile. A thread cannot be ended: that a grammar compiles in bounded
time was found out before, in a process that can (router/helpers/grammar_checker.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from ..common.clock import Clock
from ..common.errors import KVFerryError
from ..common.grammar import Grammar
from ..common.priority import give_way, offering_core
from .matching import Vocabulary, compile_checked
from .thinking import FirstMatcher

MAX_KEPT = 128  # of a megabyte or so each; larger: agents with many tools find theirs again
# From here on prompts are computed but for their last token: of 400 public schemas, 99 in a hundred compile in 28 ms.
LATE_S = 0.03
# Of a core, to compile it. What takes longer has many alternatives, and each takes its part of every token that ends
# one: 750 properties take 39 ms and 2 ms, 1,500 take 130 and 6. Smaller: forced tokens of usual schemas cost steps.
COSTLY_S = 0.03
SMALL_BYTES = 4 * 2**10  # compiled in milliseconds, and not behind one that takes a second

log = structlog.get_logger(__name__)


class _Compiled:
    """Implements `common.grammar.CompiledGrammar`. A thread writes `is_costly`, then `first` or `failure`, once."""

    __slots__ = ("_clock", "_late_at_s", "failure", "first", "is_costly")

    def __init__(self, clock: Clock) -> None:
        self.first: FirstMatcher | None = None
        self.failure = ""
        self.is_costly = False
        self._clock = clock
        self._late_at_s = clock.now() + LATE_S

    @property
    def is_ready(self) -> bool:
        return self.first is not None

    @property
    def is_late(self) -> bool:
        return self.first is None and self._clock.now() >= self._late_at_s

    def matcher(self) -> FirstMatcher:
        assert self.first is not None, "the grammar is not ready"
        return self.first.fork()


class GrammarCompiler:
    """Implements `common.grammar.Grammars`. `get` is called from any thread."""

    def __init__(
        self, load: Callable[[], Vocabulary], clock: Clock, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        """`load()` reads the vocabulary, on a thread, when the first grammar comes. `on_ready()` is called from a
        thread whenever a grammar has become ready or has failed."""
        self._load = load
        self._clock = clock
        self.on_ready = on_ready
        self._vocabulary: Vocabulary | None = None
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, _Compiled] = OrderedDict()  # the latest used last
        self._small = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # A second of it beside steps would be seen in every stream.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-grammar", initializer=_give_way)

    def get(self, grammar: Grammar) -> _Compiled:
        with self._lock:
            if (known := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return known
            compiled = self._kept[grammar] = _Compiled(self._clock)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        if len(grammar.text) <= SMALL_BYTES:
            self._small.submit(self._compile, grammar, compiled)
        else:
            self._large.submit(self._compile_aside, grammar, compiled)
        return compiled

    def _compile_aside(self, grammar: Grammar, compiled: _Compiled) -> None:
        with offering_core():
            self._compile(grammar, compiled)

    def _compile(self, grammar: Grammar, compiled: _Compiled) -> None:
        try:
            vocabulary, began_s = self._words(), time.thread_time()
            first = compile_checked(vocabulary, grammar)  # by its router
            compiled.is_costly = time.thread_time() - began_s > COSTLY_S
            compiled.first = first
        except BaseException as error:  # whatever it is, a panic too: its requests are told, and the thread goes on
            compiled.failure = str(error) if isinstance(error, KVFerryError) else repr(error)
            log.warning("grammar_failed", kind=grammar.kind, error=compiled.failure)
            with self._lock:
                self._kept.pop(grammar, None)
        self.on_ready()

    def _words(self) -> Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def close(self) -> None:
        """End the threads; what is being compiled goes on to its end."""
        for thread in (self._small, self._large):
            thread.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    give_way(threading.get_native_id())
