"""`kvferry chaos`: workers, or routers, die under load, and every answer is held against an undisturbed one.

    a deployment that nobody disturbs answers each distinct request once: the answers that are right
    -> a fresh one of the same kind under load; every few seconds a random worker gets SIGKILL or SIGSTOP
    -> quiet: nothing is sent or struck, all workers come back -> books, histories, tally

Everything is real: processes, signals, NIXL. In deterministic mode a token depends on the tokens before it alone, so a
stream that was resumed twice must equal the undisturbed one to the byte, log probabilities included. What a client may
never see is in `history.py`; the exit code is 1 if a run shows any of it, or loses a request or a block.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

from rich.console import Console

from ...common.errors import ConfigError
from ...models.config import ModelConfig
from ..load.delivery import deliver
from ..load.environment import describe_environment
from ..load.http_client import HttpError
from ..load.json_file import save_json
from ..load.report import report_console
from ..load.tiny_model import write_tiny_model
from .events import Event, Note, encode_event
from .load import Load
from .options import FIRST_BLOW_AFTER_S, Options, make_parser, parse_options
from .requests import Ask
from .serve_system import System, serving, until_ready
from .system import LogTail, settle
from .tally import Tally, print_tally, tally
from .workers import Workers

__all__ = ["main", "make_parser", "run"]  # the first two are what a program has

_ALL_UP_WITHIN_S = 60.0
_QUIET_WITHIN_S = 60.0
_RESTARTS_LOG = "restarts.log"


def main(argv: list[str] | None = None) -> int:
    """0: nothing was lost, leaked or changed; 1: something was; 2: no run, or it shows nothing; 130: interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True)
    try:
        options = parse_options(argv)
        found = run(options, errors)
    except (ConfigError, HttpError) as error:
        errors.print(f"kvferry chaos: {error}", markup=False, style="red", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("kvferry chaos: interrupted, nothing is known", style="red")
        return 130
    title = options.title(found.num_routers)

    def save(path: Path) -> None:
        environment = describe_environment("kvferry chaos", argv)
        save_json({"environment": asdict(environment), "run": title, **found.as_json()}, path)

    code = deliver("kvferry chaos", [(options.json_path, save)], lambda: print_tally(found, title, report_console()))
    errors.print(f"logs of the system: {options.log_dir}", style="dim")
    if found.lack and not any(found.broken.values()):
        hint = f" (restarts that failed: {_RESTARTS_LOG} there)" if "restart" in options.blows else ""
        errors.print(f"kvferry chaos: the run shows nothing: {found.lack}{hint}", markup=False, style="red")
        return 2
    return code or int(not found.is_good)


def run(options: Options, console: Console) -> Tally:
    """Both deployments, one after the other."""
    with ExitStack() as stack:
        model_dir = options.model
        if model_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            model_dir = write_tiny_model(folder / "tiny", num_experts=options.num_experts)
        asks = options.asks(model_dir.name, ModelConfig.from_dir(model_dir).vocab_size)
        chaos = _Chaos(options, model_dir, stack.enter_context(_history(options.history_path)), console)
        return chaos.disturb(chaos.learn(asks))


@contextmanager
def _history(path: Path | None) -> Iterator[Callable[[Event], None]]:
    if path is None:
        yield lambda event: None
        return
    with path.open("wb") as file:

        def tell(event: Event) -> None:
            file.write(encode_event(event))

        yield tell


@asynccontextmanager
async def _beside(work: Coroutine[object, object, object]) -> AsyncIterator[None]:
    """Run this beside the block, to the block's end. Whichever of the two fails ends the other."""
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work)
            yield
            task.cancel()
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


class _Chaos:
    """One run. Times are seconds since it was made."""

    def __init__(self, options: Options, model_dir: Path, tell: Callable[[Event], None], console: Console) -> None:
        self._options = options
        self._model_dir = model_dir
        self._tell = tell
        self._console = console
        self._began_s, self._wall_began_s = perf_counter(), time.time()
        self._numbers = count(1)  # of requests, disturbed or not
        self._references: Load | None = None

    @contextmanager
    def _serving(self, name: str, flags: Sequence[str]) -> Iterator[System]:
        self._console.print(f"{name}: starting", style="dim")
        with serving(name, self._model_dir, flags, self._options.log_dir) as system:
            yield system

    def learn(self, asks: Sequence[Ask]) -> list[Ask]:
        """The right answers. Returns the asks as they are sent from then on."""
        with self._serving("undisturbed", self._options.undisturbed_flags) as system:
            return asyncio.run(self._learn(system, asks))

    async def _learn(self, system: System, asks: Sequence[Ask]) -> list[Ask]:
        await until_ready(system, _ALL_UP_WITHIN_S)
        self._references = load = Load(system.base_url, self._began_s, self._tell, self._numbers)
        self._console.print(f"undisturbed: {len(asks)} distinct requests", style="dim")
        try:
            return await load.compute_references(asks, self._options.concurrency)
        finally:
            load.close()

    def disturb(self, asks: Sequence[Ask]) -> Tally:
        options = self._options
        with self._serving("disturbed", options.flags) as system:
            workers = Workers(
                self._began_s,
                self._tell,
                options.blows,
                router_pids=partial(system.program_pids, "router"),
                restart=[sys.executable, "-m", "kvferry", "restart", "--port", system.base_url.rpartition(":")[2]],
                restart_log=options.log_dir / _RESTARTS_LOG,
            )
            try:
                return asyncio.run(self._disturb(system, workers, asks))
            finally:
                # Not on the loop, whose cleanup a second Ctrl-C cuts short: a stopped worker would hold up the end.
                workers.close()

    async def _disturb(self, system: System, workers: Workers, asks: Sequence[Ask]) -> Tally:
        assert self._references is not None
        options, notes = self._options, list[Note]()

        def on_note(note: Note) -> None:
            notes.append(note)
            self._tell(note)
            workers.on_note(note)

        tail = LogTail(system.process.log_path, self._wall_began_s, on_note)
        load = Load(
            system.base_url,
            self._began_s,
            self._tell,
            self._numbers,
            comes_back="router" in options.blows,
            leaving=options.leaving,
        )
        load.references = self._references.references
        try:
            async with _beside(tail.follow()):
                admin_urls = await asyncio.to_thread(system.admin_urls)
                await self._until_up(system, admin_urls)
                tail.read()
                workers.check()
                await self._strike_under_load(load, workers, asks)
                self._console.print("disturbed: waiting for quiet", style="dim")
                await workers.until_restarted(_ALL_UP_WITHIN_S)
                books, settled_s = await settle(system, options.num_workers, _QUIET_WITHIN_S, admin_urls)
                tail.read()
        finally:
            load.close()
        return tally(
            load.results,
            load.references,
            notes,
            workers.strikes,
            books,
            settled_s=settled_s,
            num_routers=len(admin_urls),
            num_workers=options.num_workers,
            num_joined=workers.num_joined,
        )

    async def _strike_under_load(self, load: Load, workers: Workers, asks: Sequence[Ask]) -> None:
        options, over = self._options, asyncio.Event()
        source = random.Random(options.seed)
        loading = asyncio.create_task(load.run(asks, options.concurrency, options.seed, over))
        loop = asyncio.get_running_loop()
        end_s, next_s = loop.time() + 60 * options.minutes, loop.time() + FIRST_BLOW_AFTER_S
        while next_s < end_s:
            await asyncio.wait([loading], timeout=next_s - loop.time())
            next_s += options.every_s
            if loading.done():
                break  # it raised: see below
            strike = workers.strike(source)
            if strike is not None:
                what = f"{strike.at_s:6.1f} s  {strike.kind:5} {strike.worker_id}"
                self._console.print(f"{what}, {len(load.results)} requests so far", style="dim", highlight=False)
        await asyncio.wait([loading], timeout=max(0.0, end_s - loop.time()))
        over.set()
        await loading

    async def _until_up(self, system: System, admin_urls: Sequence[str]) -> None:
        books, _ = await settle(system, self._options.num_workers, _ALL_UP_WITHIN_S, admin_urls)
        if books.num_workers != self._options.num_workers:
            raise ConfigError(
                f"{books.num_workers} of {self._options.num_workers} workers came up:\n{system.process.log_tail()}"
            )
