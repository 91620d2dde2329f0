"""A worker's grammars: compiled on threads of their own, kept for the requests that come with them again.

    get ─> known: at once
       └─> new: queued ─> [thread] vocabulary, source, first mask ─> ready or failed ─> on_ready

A small grammar is compiled where a core is idle while its prompt is computed, and beside everything else, on a second
thread, where an answer has waited for it: whichever is first. So a prompt of 44 tokens takes less than 1 ms more on two
cores, and half a millisecond of compiling is left for behind it; beside the prompt's own threads to compile cost 3.5
to 4.8 ms (Zen 3).

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
from .matching import Vocabulary, compile_checked, schemas_in
from .references import may_recur
from .source import SCHEMA_KINDS
from .thinking import FirstMatcher

MAX_KEPT = 128  # of a megabyte or so each; larger: agents with many tools find theirs again
# From here on prompts are computed but for their last token: of 400 public schemas, 99 in a hundred compile in 28 ms.
LATE_S = 0.03
# Of a core, to compile it. What takes longer has many alternatives, and each takes its part of every token that ends
# one: 750 properties take 39 ms and 2 ms, 1,500 take 130 and 6. Smaller: forced tokens of usual schemas cost steps.
COSTLY_S = 0.03
# That an answer has waited. Larger: its second token, on a busy worker; smaller: the first one has not left yet, on its
# way through four threads, and meets what compiles.
PATIENCE_S = 0.005
SMALL_BYTES = 4 * 2**10  # compiled in milliseconds, and not behind one that takes a second

log = structlog.get_logger(__name__)


class _Compiled:
    """Implements `common.grammar.CompiledGrammar`. A thread writes `is_costly`, then `first` or `failure`: one of two
    that compile it, or both, the same."""

    __slots__ = ("_clock", "_late_at_s", "failure", "first", "is_awaited", "is_costly")

    def __init__(self, clock: Clock) -> None:
        self.first: FirstMatcher | None = None
        self.failure = ""
        self.is_awaited = self.is_costly = False
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
        self._awaited = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="grammar-aside", initializer=_give_way)
        # A second of it beside steps would be seen in every stream: it is aside, whoever waits.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-grammar", initializer=_give_way)

    def get(self, grammar: Grammar, *, is_awaited: bool) -> _Compiled:
        is_small = len(grammar.text) <= SMALL_BYTES
        with self._lock:
            compiled = self._kept.get(grammar)
            begins, must_read = compiled is None, self._vocabulary is None
            if compiled is None:
                compiled = self._kept[grammar] = _Compiled(self._clock)
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            hurries = is_awaited and is_small and not compiled.is_awaited and not compiled.is_ready
            compiled.is_awaited |= hurries
        if begins and is_small and must_read:  # for others, too: not where cores are idle
            self._awaited.submit(self._compile, grammar, compiled)
        elif begins:
            (self._aside if is_small else self._large).submit(self._compile_aside, grammar, compiled)
        if hurries:
            self._awaited.submit(self._compile_awaited, grammar, compiled, time.monotonic() + PATIENCE_S)
        return compiled

    def _compile_aside(self, grammar: Grammar, compiled: _Compiled) -> None:
        with offering_core():
            self._compile(grammar, compiled)

    def _compile_awaited(self, grammar: Grammar, compiled: _Compiled, from_s: float) -> None:
        time.sleep(max(0.0, from_s - time.monotonic()))
        self._compile(grammar, compiled)

    def _compile(self, grammar: Grammar, compiled: _Compiled) -> None:
        if compiled.is_ready or compiled.failure:
            return  # by the other thread
        try:
            vocabulary, began_s = self._words(), time.thread_time()
            first = compile_checked(vocabulary, grammar)  # by its router
            compiled.is_costly = time.thread_time() - began_s > COSTLY_S or _may_recur(grammar)
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
        for thread in (self._awaited, self._aside, self._large):
            thread.shutdown(wait=False, cancel_futures=True)


def _may_recur(grammar: Grammar) -> bool:
    """Tell whether a schema may hold itself: what it forces then has no end, and may take seconds to find."""
    return grammar.kind in (*SCHEMA_KINDS, "lark") and any(map(may_recur, schemas_in(grammar)[1]))


def _give_way() -> None:
    give_way(threading.get_native_id())
