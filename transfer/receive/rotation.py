"""A rotation makes sure, once a prefill worker's end cannot be waited for, that it writes nothing more here.

What a writer that gave no clean end may still do, and what ends it:

    bytes in its socket, in ours, or on the way     the agent that they go to: `TransferBackend.rotate`. This holds
                                                    where the writer is dead (its kernel still sends what it was given)
                                                    and where it is only cut off
    a post of its own, later: it was stopped,       the same: the post names an agent that is gone, and a new one is
    and looked at its lease before that             told only to those who open a grant (KVOpened)
    a copy by its own system call (`processes.py`)  the end of its process, seen by a descriptor, or its word that it
                                                    has destroyed the agent that copies (KVClosed.detached). A hung
                                                    process is killed by its launcher; D asks nobody to
    both, where transports are mixed                both, the end of the process first: what it gave to the network
                                                    before is gone with the agents after

So a rotation frees what belongs to writers that reach us through a network alone, or that had ended when it began, and
only when every rank has its new agent. A peer's closed connection, forgetting the peer, deregistering the memory and a
message that it is dead fence nothing. If no new agent can be made the blocks stay in quarantine, and it is tried again.

Open handoffs of healthy peers end with a rotation too (`rotation_timer.py` gives them time to arrive); grants that
nobody has opened do not: their KVOpen waits, and its answer names the new regions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from ...common.clock import Clock
from ...wire.grants import RegionInfo
from ..backends.reach import Reach
from .endings import Endings
from .reservation import Reservation, ReservationState
from .reservations import Reservations
from .rotation_timer import SETTLE_S, Action, Quarantined, RotationTimer, Scene

_WANTED_S = 1.0  # how long a refusal is remembered: whoever was refused asks again sooner


class Rotation:
    """Owns the regions, which change with every rotation."""

    def __init__(
        self,
        *,
        reservations: Reservations,
        endings: Endings,
        clock: Clock,
        num_blocks: int,
        regions: tuple[RegionInfo, ...],
        rotate: Callable[[int], None] | None,
    ) -> None:
        """`rotate(generation)` begins to replace the agents of all ranks; None: they cannot be."""
        self._reservations = reservations
        self._endings = endings
        self._clock = clock
        self._num_blocks = num_blocks
        self._rotate = rotate
        self._generation = regions[0].generation
        self._condemned: list[Reservation] = []  # that the rotation under way frees
        self._wanted_until = clock.now()
        self._reaches = [Reach() for _ in regions]  # of each rank
        self._are_whole(regions)
        self.timer = RotationTimer(clock)
        self.regions = regions

    def want(self) -> None:
        """A reservation was refused that would fit without the quarantine."""
        self._wanted_until = self._clock.now() + _WANTED_S

    def hurry(self) -> None:
        """The writer of a quarantine asks to write again, as over a connection that broke and was made anew."""
        self.want()
        self.step()

    def step(self) -> None:
        """Act if it is time."""
        if self._rotate is None or not self._has_reason():
            return
        action = self.timer.step(self._scene())
        if action is Action.CANCEL:
            for reservation in self._reservations.in_state(ReservationState.OPEN):
                self._endings.doom(reservation, "the decode worker replaces its transfer agents", "fenced")
            action = self.timer.step(self._scene())
        if action is Action.ROTATE:
            self._begin(self._rotate)

    def _has_reason(self) -> bool:
        timer = self.timer
        return not timer.is_idle or timer.wants_repair or bool(self._reservations.num_quarantined_blocks)

    def _scene(self) -> Scene:
        now = self._clock.now()
        doomed = self._reservations.in_state(ReservationState.DOOMED)
        by_writer: dict[int, list[Reservation]] = defaultdict(list)
        for reservation in doomed:
            assert reservation.writer is not None
            if reservation.writer.is_behind_network:
                by_writer[reservation.writer.incarnation].append(reservation)
        return Scene(
            num_pool_blocks=self._num_blocks,
            quarantined=tuple(
                Quarantined(
                    num_blocks=sum(len(reservation.block_ids) for reservation in found),
                    age_s=now - min(reservation.since for reservation in found),
                    is_dead=any(reservation.writer is not None and reservation.writer.is_dead for reservation in found),
                )
                for found in by_writer.values()
            ),
            num_open=len(self._reservations.in_state(ReservationState.OPEN)),
            num_closing=sum(
                now - reservation.since < SETTLE_S
                for reservation in doomed
                if reservation.writer is not None and not reservation.writer.is_behind_network
            ),
            is_wanted=now < self._wanted_until,
        )

    def _begin(self, rotate: Callable[[int], None]) -> None:
        """Begin a rotation. Writers that had not ended by now are not fenced by it."""
        assert not self._reservations.in_state(ReservationState.OPEN)
        self._condemned = [
            reservation
            for reservation in self._reservations.in_state(ReservationState.DOOMED)
            if reservation.writer is not None and reservation.writer.is_behind_network
        ]
        self._generation += 1
        rotate(self._generation)

    def rotated(self, regions: tuple[RegionInfo, ...]) -> int:
        """Every rank has its new agent: how many blocks are free now."""
        assert all(region.generation == self._generation for region in regions), "a rank was left behind"
        condemned, self._condemned = self._condemned, []
        freed = [reservation for reservation in condemned if reservation.state is ReservationState.DOOMED]
        for reservation in freed:
            self._endings.end_doomed(reservation)
        self.regions = regions
        self.timer.rotated(are_whole=self._are_whole(regions))
        return sum(len(reservation.block_ids) for reservation in freed)

    def _are_whole(self, regions: tuple[RegionInfo, ...]) -> bool:
        """Take the ranks' new agents. Tell whether none lacks a device that an earlier one had."""
        are_whole = [reach.take(each.agent_metadata) for reach, each in zip(self._reaches, regions, strict=True)]
        return all(are_whole)

    def failed(self) -> None:
        """Some rank has no agent: its old one is gone, and nobody can write there."""
        self._condemned = []
        self.timer.failed()
