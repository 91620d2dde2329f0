"""An adoption turns a prompt's KV that has arrived into sequences that decode.

Choices that ended while it was on its way take no row; full blocks are shared by the others, each has its own copy
of a partial last one. The router is told of every adoption, also of one that brings no token: who is lost in the step
that follows had that request in it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common import failpoints
from ..common.clock import Clock
from ..common.served import Served
from ..kvcache.contents import Contents
from ..transfer.receive.receiver import KVReceiver
from ..transfer.receive.reservation import Reservation
from .outbox import Outbox
from .requests import RunningRequests
from .running import RunningRequest, expiry_s
from .scheduler import DecodeScheduler


class Adoption:
    """Takes over reservations, whether there is a row for them or not: the scheduler parks those without."""

    def __init__(
        self,
        receiver: KVReceiver,
        scheduler: DecodeScheduler,
        requests: RunningRequests,
        outbox: Outbox,
        clock: Clock,
        contents: Contents,
        served: Served,
    ) -> None:
        self._receiver = receiver
        self._scheduler = scheduler
        self._requests = requests
        self._outbox = outbox
        self._clock = clock
        self._served = served
        self._contents = contents
        # Choices that ended while their prompt was still on its way, by (request id, attempt).
        self._ended_early: dict[tuple[str, int], set[int]] = {}

    def __len__(self) -> int:
        """Attempts of which something is remembered."""
        return len(self._ended_early)

    def drop_choices(self, request_id: str, attempt: int, choices: tuple[int, ...]) -> None:
        """Remember that these choices are not wanted any more when the prompt arrives."""
        self._ended_early.setdefault((request_id, attempt), set()).update(choices)

    def forget_all_but(self, is_awaited: Callable[[str], bool]) -> None:
        self._ended_early = {key: ended for key, ended in self._ended_early.items() if is_awaited(key[0])}

    def adopt_arrived(self) -> bool:
        """False: there was nothing."""
        arrived = list(self._receiver.arrived)
        for reservation in arrived:
            self._adopt(reservation)
        return bool(arrived)

    def _adopt(self, reservation: Reservation) -> None:
        if failpoints.armed:
            failpoints.hit("decode.adopt")
        blocks, copies = self._receiver.adopt(reservation)
        spec = reservation.spec
        request = RunningRequest(reservation.router_id, spec, expiry_s(spec, self._clock.now()))
        request.num_cached_tokens = reservation.num_cached_by_writer
        request.grammar = self._served.grammar(spec, is_awaited=True)  # compiled since its reservation
        request.held_adapter = self._served.adapter(spec)  # loaded since then
        self._requests.add(request)
        first = {choice.choice: choice for choice in reservation.first_tokens}
        ended = self._ended_early.pop((spec.request_id, spec.attempt), set())
        self._outbox.mention(request)
        for index, choice in enumerate(spec.choices):
            if choice in ended:
                continue
            outputs = spec.output_token_ids(index)
            if choice in first:
                outputs = [token.token_id for token in first[choice].tokens]
                self._outbox.add(request, first[choice])
            if choice not in first or first[choice].finish is None:
                seq = request.sequences[choice] = self._contents.sequence(
                    spec, choice, outputs, reservation.block_hashes
                )
                seq.grammar, seq.held_adapter = request.grammar, request.held_adapter
                seq.is_retained_elsewhere = not reservation.retains_prefix
                seq.num_thin_blocks = reservation.num_thin
        self._place(request, blocks, copies)

    def _place(self, request: RunningRequest, blocks: list[int], copies: list[int]) -> None:
        """Hand a prompt's blocks to the request's sequences."""
        sequences = list(request.sequences.values())
        self._scheduler.blocks.deal(sequences, request.spec.num_prompt_tokens, blocks, copies)
        for seq in sequences:
            seq.has_begun = True
            if seq.num_output_tokens > 0:
                self._scheduler.adopt(seq)
                continue
            # Nothing is sampled yet: its prompt's last token is fed once more, behind what is found of what arrived.
            seq.num_cached_tokens = seq.num_prompt_tokens
            self._scheduler.blocks.give_back(seq)
            seq.num_computed_tokens = seq.num_published_blocks = 0
            self._scheduler.requeue(seq)
        if not sequences:
            self._requests.finish(request)
