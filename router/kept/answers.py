"""The folder of kept answers, which routers share: who comes back with a key finds there what was told under it.

    NAME          an answer, locked (flock) by the router that tells it: the lock ends with that process
    wanted/NAME   somebody waits for that answer, whose router looks here and hands it over

A client that comes back is the one that is served: whoever still tells the answer to an older connection ends there.
What nobody has written to for KEEP_S is deleted, and the oldest before that where all together take too much, but for
the answers of tasks: they go on however long there was no router.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from ...common.errors import RequestError
from ...common.request import SamplingParams
from ..state.errors import StreamError
from .answer_log import AnswerLog, has_told
from .asking import key_name, key_reused
from .files import is_under_way, make_usable, open_locked, share_of_open_files
from .kept_answer import AnswerKey, KeptAnswer
from .sweeper import Sweeper

KEEP_S = 600.0
MAX_BYTES = 256 * 2**20  # of all answers
HAND_OVER_S = 5.0  # until who waits for an answer gives up
_LOOK_EVERY_S = 0.1  # whether somebody waits, or may go on
_READ_INLINE = 2**16  # bytes
_FILES_SHARE = 3  # one in so many open files may be an answer's

log = structlog.get_logger(__name__)


class KeptAnswers:
    """`KeptAnswers` is one router's hold on the folder. Belongs to its loop."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a folder that cannot be used."""
        self.path, self._wanted = path, path / "wanted"
        self._held: dict[str, KeptAnswer] = {}  # by name
        self._max_held = share_of_open_files(_FILES_SHARE)
        self._is_watching = False
        self.sweeper = Sweeper(path, KEEP_S, MAX_BYTES, _delete_unless_told)
        make_usable("answers_dir", path, self._wanted, written=path)

    def __len__(self) -> int:
        """Count the answers that are being told here."""
        return len(self._held)

    async def take(self, key: AnswerKey, served: str) -> KeptAnswer:
        """Return the answer of this key, a new one where there is none. Waits while another connection is told it.

        `served`: the version of the model that is asked for. Raises OSError where it cannot be kept.

        Raises RequestError (422) where the key stands for another request, StreamError (409) where the answer is not
        handed over, and where the client has events of an answer that is not here.
        """
        self.sweeper.now_and_then()
        answer = await self._locked(key, served)
        head = answer.head
        try:
            if head is not None and head.asked != key.asked:
                raise key_reused()
            if key.after and not answer.is_repeated:
                raise StreamError(
                    "the answer to this Idempotency-Key is not kept any more: ask without Last-Event-ID for a new one",
                    "answer_not_kept",
                    409,
                )
        except BaseException:
            answer.close()
            raise
        return answer

    async def _locked(self, key: AnswerKey, served: str) -> KeptAnswer:
        if (answer := await self._open(key, served)) is not None:
            return answer
        loop, wanted = asyncio.get_running_loop(), self._wanted / key.name
        until_s = loop.time() + HAND_OVER_S
        try:
            while loop.time() < until_s:
                wanted.touch(mode=0o600)  # again: who took the answer meanwhile has taken the mark away
                await asyncio.sleep(_LOOK_EVERY_S)
                if (answer := await self._open(key, served)) is not None:
                    return answer
        finally:
            wanted.unlink(missing_ok=True)
        raise StreamError(
            f"the answer to this Idempotency-Key is told to another connection, which did not end in {HAND_OVER_S:g} s",
            "idempotency_key_in_use",
            409,
        )

    async def _open(self, key: AnswerKey, served: str) -> KeptAnswer | None:
        """Return None while somebody else has the answer."""
        if len(self._held) >= self._max_held:
            raise OSError(errno.EMFILE, f"{len(self._held)} answers are kept at once")
        path = self.path / key.name
        fd = _lock(path)
        if fd is None:
            return None
        opened = await _read(fd)
        try:
            (self._wanted / key.name).unlink(missing_ok=True)  # who waited for it may have died
            answer = KeptAnswer(key, served, path, opened, self._on_close)
        except BaseException:
            opened.close()
            raise
        self._held[key.name] = answer
        self._watch()
        return answer

    def _on_close(self, answer: KeptAnswer) -> None:
        if self._held.get(answer.key.name) is answer:  # else it was forgotten while it was told, and came again
            del self._held[answer.key.name]

    def forget(self, name: str) -> None:
        """Let nobody find the answer of this name any more. Who is just told it gets it to its end."""
        (self.path / name).unlink(missing_ok=True)

    # --- who waits for one that is told here ------------------------------------------------------------------

    def _watch(self) -> None:
        if not self._is_watching and self._held:
            self._is_watching = True
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._is_watching = False
        with contextlib.suppress(OSError):  # who waits gives up, or is seen at a later look
            for name in os.listdir(self._wanted) if self._held else ():
                if (answer := self._held.get(name)) is not None:
                    answer.on_wanted()
        self._watch()


async def take(
    answers: KeptAnswers | None, key: AnswerKey | None, served: str, sampling: Sequence[SamplingParams]
) -> KeptAnswer | None:
    """Take the answer of a key, if there is one; None where it cannot be kept, which the log tells.

    What is said of a prompt is not: each life of the request computes it anew.
    """
    if answers is None or key is None or any(params.prompt_logprobs is not None for params in sampling):
        return None
    try:
        return await answers.take(key, served)
    except OSError as error:
        log.warning("answer_not_kept", reason=error.strerror or str(error))
        return None


def names_told(answers: KeptAnswers | None, headers: Mapping[bytes, bytes], tenant: bytes) -> bool:
    """Tell whether a call's key names an answer of which something was told. It is not taken."""
    try:
        name = key_name(headers, tenant)
    except RequestError:  # it is refused where the body is known
        return False
    return answers is not None and name is not None and has_told(answers.path / name)


def _delete_unless_told(path: Path) -> bool:
    if is_under_way(path) or (fd := _lock(path)) is None:
        return False
    try:
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)
    return True


def _lock(path: Path) -> int | None:
    """Open the file, which is made where there is none; None while somebody else has it."""
    fd = open_locked(path, os.O_CREAT | os.O_APPEND)
    if fd is None:
        return None
    try:
        if _is_at(path, fd):  # else it was deleted before it was locked
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_at(path: Path, fd: int) -> bool:
    """Tell whether the open file still has its name."""
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


async def _read(fd: int) -> AnswerLog:
    """Read the file, a long one on a thread, which has it for itself until it is done. Closes what fails."""
    if os.fstat(fd).st_size <= _READ_INLINE:
        return _opened(fd)
    reading = asyncio.ensure_future(asyncio.to_thread(_opened, fd))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        reading.add_done_callback(_close_read)
        raise


def _close_read(reading: asyncio.Future[AnswerLog]) -> None:
    if reading.exception() is None:
        reading.result().close()


def _opened(fd: int) -> AnswerLog:
    """Read the file; its lock goes with it where that fails, and others may try."""
    try:
        return AnswerLog(fd)
    except BaseException:
        os.close(fd)
        raise
