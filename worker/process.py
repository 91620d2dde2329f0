"""The one worker program: an engine, transfer agents, sockets, and both roles, of which one is active.

    network thread (asyncio)   sessions with routers, handoff control sockets, heartbeats
    engine thread              `engine.loop`: schedule, compute, hand out
    transfer threads           `transfer.thread`: one posts writes and polls them, one takes arrivals

They meet under one lock (`worker/worker.py`), which nobody holds while computing, copying or waiting. With tensor
parallelism this process is rank 0, and the other ranks are its children.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from ..common.config import WorkerConfig, environment
from ..common.errors import ConfigError, KVFerryError, WorkerLost
from ..common.imports import kept_imports
from ..common.logs import configure_logging
from ..transfer.protocol.rank_messages import FollowerMessage, FollowerSetup
from ..wire.codec import Decoder
from ..wire.credentials import SharedSecret, read_secrets
from ..wire.fields import Message
from ..wire.frames import max_frame_bytes
from ..wire.lifeline import Lifeline
from .courtesy import Courtesy
from .ranks import Followers
from .sessions import RouterSessions
from .tasks import begin

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.follower import FollowerHandler
    from .deps import WorkerDeps
    from .worker import Worker

TICK_S = 0.1  # of the worker's deadlines and heartbeats
LIFELINE_TICKS = 5
STEP_LIMIT_S = 60.0  # a step that takes longer, and longer than ten times the one before, hangs

log = structlog.get_logger(__name__)


class WorkerProcess:
    """Keeps the sessions with routers, runs until it is told to end."""

    def __init__(self, config: WorkerConfig, secret: SharedSecret, lifeline: Lifeline | None) -> None:
        self._config = config
        self._secret = secret
        self._lifeline = lifeline
        self._incarnation = secrets.randbits(63)
        self._followers = Followers(
            config, self._incarnation, on_message=self._on_follower, on_failure=self._on_failure
        )
        self._worker: Worker | None = None
        self._sessions: RouterSessions | None = None
        self._was_told_to_end = False

    async def run(self) -> int:
        """Run until it has drained (SIGTERM, or a router's Drain), SIGINT or a failure.

        The exit code: 0, 1 (failure) or 2 (configuration).
        """
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: whoever runs us cancels instead
            self._loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
            self._loop.add_signal_handler(signal.SIGINT, self._end_now)
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        if self._lifeline is not None:
            self._lifeline.listen(self._on_launcher)
        try:
            deps = await asyncio.to_thread(self._build)
            await self._serve(deps)
            code = await self._ended
            if code == 0:
                self._say_goodbye()
            return code
        except asyncio.CancelledError:
            self._say_goodbye()
            raise
        except KVFerryError as error:
            may_pass = isinstance(error, WorkerLost) and not self._followers.have_said_why
            return _refuse(self._config, self._lifeline, error, may_pass=may_pass)
        except Exception as error:  # as where no thread can be made: the log has where it comes from
            if self._lifeline is not None:
                self._lifeline.broke(f"{type(error).__name__}: {error}")
            raise
        finally:
            await self._close()

    def _say_goodbye(self) -> None:
        if self._sessions is not None:
            self._sessions.say_goodbye()

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    def _end_now(self) -> None:
        if self._sessions is None:  # the thread that loads cannot be stopped, and nothing is to be put in order
            os._exit(0)
        self._end(0)

    def _on_sigterm(self) -> None:
        """Drain; the second one ends at once. A drain that a router has ordered goes on."""
        if self._worker is None or self._sessions is None or self._was_told_to_end:
            self._end_now()
        else:
            self._was_told_to_end = True
            self._worker.drain(self._config.drain_timeout)

    def _on_launcher(self, event: dict[str, object]) -> None:
        """Obey the launcher. On the lifeline's thread."""
        if event["event"] == "reload":
            self._call_soon(self._reload)
        elif event["event"] == "stopping" and self._sessions is not None:
            self._sessions.are_ending = True

    def _reload(self) -> None:
        """Read the secret file again. What cannot be used leaves all as it was, and is told."""
        file = self._config.secret_file
        try:
            if file is not None:
                self._secret.replace(read_secrets(file, {}))
        except ConfigError as error:
            log.error("reload_failed", worker_id=self._config.worker_id, error=str(error))
            failure = str(error)
        else:
            log.info("reloaded", worker_id=self._config.worker_id)
            failure = ""
        if self._lifeline is not None:
            self._lifeline.send({"event": "reloaded", "error": failure})

    def _announce(self) -> None:
        """Send heartbeats now. What the worker does may have changed."""
        if self._sessions is not None:
            self._sessions.send_status()
            self._yield_cores()

    def _yield_cores(self) -> None:
        """Give way to workers that decode, while this one does not."""
        assert self._worker is not None
        yields = not self._worker.decodes
        if yields and self._worker.active_role != self._config.role and not self._courtesy.is_revocable:
            return  # it would stay so
        self._courtesy.set(yields)

    def _call_soon(self, function: Callable[[], None]) -> None:
        """Onto the network thread, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: the worker is ending anyway
            self._loop.call_soon_threadsafe(function)

    def _on_failure(self, error: BaseException) -> None:
        """A thread of ours, or a task of the network's, has failed: nothing works any more. Called there."""
        log.error("worker_failed", worker_id=self._config.worker_id, error=f"{type(error).__name__}: {error}")
        self._call_soon(lambda: self._end(1))

    # --- dependencies --------------------------------------------------------------------------------------------

    def _build(self) -> WorkerDeps:
        """Make the dependencies. Beside the event loop: it takes seconds."""
        with kept_imports():
            from .build import Outlets, build_deps

        outlets = Outlets(self._to_router, self._call_soon, self._on_failure, self._progress)
        return build_deps(self._config, self._secret, self._incarnation, self._followers, outlets)

    def _progress(self, what: str, fraction: float) -> None:
        if self._lifeline is not None:
            self._lifeline.progress(what, fraction)

    def _on_follower(self, rank: int, message: FollowerMessage) -> None:
        """Take what another rank says of transfers. On the rank group's thread."""
        if self._worker is not None:
            self._worker.on_follower(rank, message)

    # --- serving ------------------------------------------------------------------------------------------

    async def _serve(self, deps: WorkerDeps) -> None:
        from .deps import worker_hello
        from .worker import Worker

        worker = Worker(deps, self._announce)
        await worker.start()
        self._worker = worker
        self._sessions = RouterSessions(
            self._config.routers,
            worker_hello(deps, worker.kv_address),
            secret=self._secret,
            max_frame_bytes=max_frame_bytes(deps.engine.model_config.max_model_len),
            on_message=worker.on_router_message,
            on_lost=worker.on_router_lost,
            status=worker.status,
            on_failure=self._on_failure,
            on_joined=worker.on_router_joined,
        )
        self._sessions.refused.add_done_callback(self._on_refused)
        self._sessions.start()
        self._ticking = begin(self._tick(), self._on_failure)
        # Not before: whoever waits for this worker waits for its start.
        self._courtesy = Courtesy(self._config.niceness, os.getpid(), *self._followers.pids)
        self._yield_cores()
        log.info("worker_ready", worker_id=self._config.worker_id, blocks=deps.engine.num_blocks)
        if self._lifeline is not None:
            self._lifeline.ready(worker_id=self._config.worker_id, incarnation=self._incarnation)

    def _to_router(self, router_id: str, message: Message) -> None:
        """Send to a router. From any thread."""
        if self._sessions is not None:
            self._sessions.send(router_id, message)

    def _on_refused(self, refused: asyncio.Future[str]) -> None:
        if not refused.cancelled():
            self._end(_refuse(self._config, self._lifeline, KVFerryError(refused.result())))

    async def _tick(self) -> None:
        """Deadlines, and heartbeats to the launcher."""
        assert self._worker is not None
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            self._worker.tick()
            self._yield_cores()
            hangs = self._hangs()  # asked at each tick: it is how a stop of this process is noticed
            if ticks % LIFELINE_TICKS == 0 and self._lifeline is not None and not hangs:
                self._lifeline.beat()
            if self._worker.has_drained and not self._ended.done():
                log.info("worker_drained", worker_id=self._config.worker_id, num_left=self._worker.num_unfinished)
                self._end(0)
            ticks += 1

    def _hangs(self) -> bool:
        """The running step takes so long that it will not end: the launcher shall hear nothing more of us."""
        assert self._worker is not None
        loop = self._worker.loop
        return loop.busy_for_s > max(STEP_LIMIT_S, 10 * loop.last_step_s)

    async def _close(self) -> None:
        if self._sessions is not None:
            self._ticking.cancel()
            await self._sessions.close()
        if self._worker is not None:
            await self._worker.close()
        if self._followers.group is not None:
            await asyncio.to_thread(self._followers.close)


def make_follower(engine: Engine, config: bytes, send: Callable[[bytes], None]) -> FollowerHandler:
    """Make what another tensor-parallel rank of a worker runs beside its engine."""
    setups: Decoder[FollowerSetup] = Decoder(FollowerSetup)
    setup = setups.decode(config)
    from .follower import FollowerPair

    return FollowerPair(engine, setup, send)


async def serve_worker(config: WorkerConfig, secret: SharedSecret, lifeline: Lifeline | None) -> int:
    """Run a worker until it ends; cancelling ends it too. The exit code of the process that it deserves."""
    return await WorkerProcess(config, secret, lifeline).run()


def main() -> int:
    """Run `python -m kvferry.worker`, as the launcher starts it. The secret is in a file or in the environment."""
    parser = argparse.ArgumentParser(prog="kvferry.worker")
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--lifeline-fd", type=int)
    parser.add_argument("--stderr-fd", type=int)
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a reload before there is anything to read again
    config = WorkerConfig.model_validate_json(args.config_json)
    lifeline = Lifeline.from_fds(args.lifeline_fd, args.stderr_fd)
    configure_logging(config.log_level, log_format=config.log_format, worker_id=config.worker_id)
    try:
        secret = SharedSecret(*read_secrets(config.secret_file, environment()))
    except ConfigError as error:
        return _refuse(config, lifeline, error)
    # Not closed: that would wait for a name that is still being resolved. The process ends next (`exit_process`).
    return asyncio.Runner().run(serve_worker(config, secret, lifeline))


def _refuse(config: WorkerConfig, lifeline: Lifeline | None, error: KVFerryError, *, may_pass: bool = False) -> int:
    """Say why the worker cannot start: to the launcher where there is one, which tells it, else to the log."""
    if lifeline is not None:
        (lifeline.broke if may_pass else lifeline.failed)(str(error))
    else:
        log.error("worker_cannot_start", worker_id=config.worker_id, error=str(error))
    return 1 if may_pass else 2
