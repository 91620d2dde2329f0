"""Requests whose prompt a decode worker computes itself: fresh ones, and those that go on here after another worker.

begin ─> sequences that the scheduler takes ─> more of the prompt is read from another worker, where it is known of
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.request import RequestSpec, Sequence
from ..common.served import Served
from ..kvcache.contents import Contents
from ..transfer.fetch.fetches import Fetches
from ..wire.tasks import FetchFrom, LocalTask
from .requests import RunningRequests
from .running import RunningRequest, expiry_s
from .scheduler import DecodeScheduler


class LocalRequests:
    """Begins them. They run like all others from then on."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        requests: RunningRequests,
        fetches: Callable[[], Fetches | None],
        *,
        clock: Clock,
        contents: Contents,
        served: Served,
    ) -> None:
        """`fetches()` None: everything that is not in the cache is computed."""
        self._scheduler = scheduler
        self._requests = requests
        self._fetches = fetches
        self._clock = clock
        self._contents = contents
        self._served = served

    def begin(self, router_id: str, task: LocalTask) -> None:
        """Begin its request. Raises CapacityError: it can never fit, and nothing of it is here."""
        spec, source = task.spec, task.fetch
        request = RunningRequest(router_id, spec, expiry_s(spec, self._clock.now()))
        request.grammar = grammar = self._served.grammar(spec, is_awaited=not task.first_mask)
        request.held_adapter = self._served.adapter(spec)
        if grammar is not None and not grammar.is_ready:  # the prompt need not wait, where its mask is known
            grammar = task.first_grammar() or grammar
        try:
            for seq in self._prompt_sequences(spec):
                seq.grammar, seq.held_adapter = grammar, request.held_adapter
                self._scheduler.add(seq)
                request.sequences[seq.choice] = seq
        except CapacityError:
            for seq in request.sequences.values():
                self._scheduler.remove(seq)
            raise
        self._requests.add(request)
        self._scheduler.pace.tokens_behind = task.tokens_behind
        fetches = self._fetches()
        if source is not None and fetches is not None:
            self._fetch(list(request.sequences.values()), source, fetches)

    def _prompt_sequences(self, spec: RequestSpec) -> list[Sequence]:
        """A fresh request computes its prompt once for all choices; resumed choices go each their own way."""
        make = self._contents.sequence
        if spec.is_resume:
            return [make(spec, choice, spec.output_token_ids(index)) for index, choice in enumerate(spec.choices)]
        first = make(spec, spec.choices[0])
        first.pending_choices = spec.choices
        return [first]

    def _fetch(self, sequences: list[Sequence], source: FetchFrom, fetches: Fetches) -> None:
        """Read what lies elsewhere before the prompt is begun. If it ends meanwhile, the cache has it for others."""

        def fetched() -> None:
            for seq in sequences:
                seq.is_fetching = False

        blocks = self._scheduler.blocks
        hashes, rule = blocks.known.reusable_hashes(sequences[0]), blocks.cache.thin_rule()
        is_fetching = fetches.begin(f"local {sequences[0].request_id}", hashes, source, rule, fetched)
        for seq in sequences:
            seq.is_fetching = is_fetching
