"""`RotationTimer` says when a decode worker replaces its transfer agents, to end all writing into quarantined blocks.

    IDLE ──due──> SETTLING ──no open handoff is left, or 1 s──> CANCELLING ──those ended, or 1 s──> ROTATING ──> IDLE
      ^              │                                              │                                  │ ^
      └──────────────┴──the quarantine ended by itself──────────────┘                                  └─┘ failed: again

A rotation costs the handoffs that are open at that moment, so it waits until it is worth that: until blocks are wanted,
or many, or old. What it frees, and what it does not, is decided in `rotation.py`. Pure over a clock.

One during an outage may leave an agent that lacks a network device for as long as it lives. Then another is to follow,
which gives up no handoff: those that are open get a second to arrive, and where they do not it is put off.

    IDLE ──an agent lacks a device──> REPAIRING ──no open handoff is left──> ROTATING
      ^                                   │
      └───────────────1 s─────────────────┘
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ...common.clock import Clock
from ..backends.reach import Repair

MIN_INTERVAL_S = 5.0  # between two rotations
SETTLE_S = 1.0  # that open handoffs of healthy peers get to arrive, and a quarantine to end by itself
CANCEL_S = 1.0  # that cancelled ones get to end
MAX_AGE_S = 10.0
MAX_POOL_SHARE = 0.1
RETRY_S = 1.0  # after a rotation that failed


class Phase(Enum):
    IDLE = "idle"
    SETTLING = "settling"  # what is open may still arrive, nothing more is opened
    CANCELLING = "cancelling"  # what was open is given up and may end
    REPAIRING = "repairing"  # as SETTLING, but nothing will be given up
    ROTATING = "rotating"  # agents are being replaced, on every rank


class Action(Enum):
    NONE = "none"
    CANCEL = "cancel"  # give up what is open
    ROTATE = "rotate"


class Quarantined(NamedTuple):
    """Blocks that one prefill worker left and a rotation would free."""

    num_blocks: int
    age_s: float  # of the oldest
    is_dead: bool  # it will not end by itself


class Scene(NamedTuple):
    """The decode worker's handoffs as a rotation sees them."""

    num_pool_blocks: int
    quarantined: tuple[Quarantined, ...]
    num_open: int
    num_closing: int  # given up a moment ago, and not freed by a rotation: they have to end by themselves
    is_wanted: bool  # a reservation was refused that would fit without the quarantine, or a writer asks again


class RotationTimer:
    """Says when. `rotated` or `failed` answers each ROTATE."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = 0.0
        self._next_at = clock.now()
        self._retry_at: float | None = None  # None: a rotation runs
        self._has_failed = False
        self._repair = Repair()
        self.phase = Phase.IDLE
        self.num_rotations = 0
        self.num_failures = 0

    @property
    def is_idle(self) -> bool:
        return self.phase is Phase.IDLE

    @property
    def wants_repair(self) -> bool:
        """Tell whether an agent lacks a device that an earlier one had."""
        return self._repair.at is not None

    @property
    def has_failed(self) -> bool:
        """There is no agent now: the last rotation that ended left none."""
        return self._has_failed

    def step(self, scene: Scene) -> Action:
        """Return what is to be done now; NONE while a rotation runs."""
        if self.phase is Phase.ROTATING:
            return self._retry()
        if self.phase is Phase.IDLE and self._repair.is_due(self._clock.now()):
            self._enter(Phase.REPAIRING)
        if self.phase is Phase.REPAIRING:
            return self._step_repair(scene)
        if not scene.quarantined:
            self._enter(Phase.IDLE)
        elif self.phase is Phase.IDLE and self._is_due(scene):
            self._enter(Phase.SETTLING)
        if self.phase is Phase.SETTLING and (not scene.num_open or self._waited_s >= SETTLE_S):
            self._enter(Phase.CANCELLING)
            if scene.num_open:
                return Action.CANCEL
        if self.phase is Phase.CANCELLING and (not scene.num_closing or self._waited_s >= CANCEL_S):
            self._enter(Phase.ROTATING)
            return Action.ROTATE
        return Action.NONE

    def _retry(self) -> Action:
        if self._retry_at is None or self._clock.now() < self._retry_at:
            return Action.NONE
        self._retry_at = None
        return Action.ROTATE

    def _step_repair(self, scene: Scene) -> Action:
        if not scene.num_open and not scene.num_closing:
            self._enter(Phase.ROTATING)
            return Action.ROTATE
        if self._waited_s >= SETTLE_S:
            self._repair.put_off(self._clock.now())
            self._enter(Phase.IDLE)
        return Action.NONE

    def _is_due(self, scene: Scene) -> bool:
        if self._clock.now() < self._next_at:
            return False
        settled = [found for found in scene.quarantined if found.is_dead or found.age_s >= SETTLE_S]
        return bool(settled) and (
            scene.is_wanted
            or sum(found.num_blocks for found in settled) > MAX_POOL_SHARE * scene.num_pool_blocks
            or max(found.age_s for found in settled) >= MAX_AGE_S
        )

    @property
    def _waited_s(self) -> float:
        return self._clock.now() - self._since

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase, self._since = phase, self._clock.now()

    def rotated(self, *, are_whole: bool) -> None:
        """Every rank has a new agent. `are_whole`: none lacks a device that an earlier one had."""
        assert self.phase is Phase.ROTATING
        self.num_rotations += 1
        self._has_failed = False
        self._next_at = self._clock.now() + MIN_INTERVAL_S
        self._repair.replaced(self._clock.now(), are_whole=are_whole)
        self._enter(Phase.IDLE)

    def failed(self) -> None:
        """Some rank has none."""
        assert self.phase is Phase.ROTATING
        self.num_failures += 1
        self._has_failed = True
        self._retry_at = self._clock.now() + RETRY_S
