"""`Followers` are the other tensor-parallel ranks of a worker, as its rank 0 starts, hears and ends them.

    start ─> each makes its engine, registers its memory ─FollowerRegion─> wait_registered ─> on_message ... ─> close

A worker of one rank has none: its group is None, and there is nobody to wait for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import __version__
from ..common.config import WorkerConfig
from ..common.errors import ConfigError, KVFerryError, WorkerLost
from ..transfer.protocol.rank_messages import (
    FollowerMessage,
    FollowerRegion,
    FollowerSetup,
    TransferBroke,
    follower_messages,
)
from ..wire.codec import encode
from ..wire.grants import ProcessMark, RegionInfo

if TYPE_CHECKING:
    from ..engine.ranks.group import RankGroup

LEAVE_S = 5.0  # to end in good order when another rank is gone; a step on a GPU would wait longer for it
REGION_TIMEOUT_S = 60.0  # from our engine's start to the last rank's registered memory


class Followers:
    """One worker's. Their messages come on the rank group's thread."""

    def __init__(
        self,
        config: WorkerConfig,
        incarnation: int,
        *,
        on_message: Callable[[int, FollowerMessage], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`on_message`: takes what a rank says once it runs. `on_failure`: the worker cannot go on without it."""
        self._config = config
        self._incarnation = incarnation
        self._on_message = on_message
        self._on_failure = on_failure
        self._num_followers = config.engine.tensor_parallel_size - 1
        self._registered: dict[int, FollowerRegion] = {}  # by rank
        self._are_heard = threading.Event()  # all have registered, or one has ended
        self.group: RankGroup | None = None

    def start(self) -> RankGroup | None:
        """Start their processes. None: there are none."""
        if not self._num_followers:
            return None
        from ..engine.ranks.frames import FollowerLogs
        from ..engine.ranks.group import RankGroup

        config = self._config
        setup = FollowerSetup(
            worker_id=config.worker_id,
            incarnation=self._incarnation,
            version=__version__,
            transfer=config.transfer.model_dump_json(),
        )
        self.group = RankGroup.start(
            config.engine,
            handler="kvferry.worker.process:make_follower",
            handler_config=encode(setup),
            on_message=self._on_payload,
            on_lost=self._on_lost,
            logs=FollowerLogs(level=config.log_level, format=config.log_format, worker_id=config.worker_id),
        )
        return self.group

    def wait_registered(self) -> None:
        """Wait until the memory of all is registered. Raises WorkerLost if one has ended, ConfigError if it is late."""
        if self.group is None:
            return
        are_heard = self._are_heard.wait(REGION_TIMEOUT_S)
        self.group.check()
        if not are_heard:
            raise ConfigError(f"{self._num_followers} other ranks did not register within {REGION_TIMEOUT_S} s")

    @property
    def regions(self) -> tuple[RegionInfo, ...]:
        """Return their memory, in the order of the ranks."""
        return tuple(found.region for _, found in sorted(self._registered.items()))

    @property
    def processes(self) -> tuple[ProcessMark, ...]:
        """Return those that may copy into other processes' memory by themselves."""
        marks = (found.process for _, found in sorted(self._registered.items()))
        return tuple(mark for mark in marks if mark is not None)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self.group.pids) if self.group is not None else ()

    @property
    def have_said_why(self) -> bool:
        """Tell whether one has ended by an error of its own, which it would meet again."""
        return self.group is not None and self.group.has_failed

    def close(self) -> None:
        if self.group is not None:
            self.group.close()

    def _on_lost(self, reason: str) -> None:
        """End, whether a step notices or none runs. On the rank group's thread."""
        self._on_failure(WorkerLost(reason))
        self._are_heard.set()
        if self._config.engine.device == "cpu":
            return  # a step's collective fails at once; on a GPU it may wait for that rank
        leave = threading.Timer(LEAVE_S, os._exit, (1,))
        leave.daemon = True
        leave.start()

    def _on_payload(self, rank: int, payload: bytes) -> None:
        message = follower_messages.decode(payload)
        if isinstance(message, FollowerRegion):
            self._registered[rank] = message
            if len(self._registered) == self._num_followers:
                self._are_heard.set()
        elif isinstance(message, TransferBroke):
            self._on_failure(KVFerryError(f"rank {rank}: {message.reason}"))
        else:
            self._on_message(rank, message)
