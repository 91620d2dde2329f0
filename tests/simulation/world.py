"""One simulated world: routers, workers, clients and faults of a scenario, from the first event to rest.

Scenario ─> World.run ─> requests come, faults strike ... calm ─> everything ends, everything is given back
                └─> Breach: an invariant does not hold
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvferry.common.errors import RequestError
from kvferry.router.dispatch.deadlines import WORKER_WAIT_S
from kvferry.router.dispatch.verdicts import MAX_EXTRA
from kvferry.router.state.classes import RequestClasses
from kvferry.router.state.request import RouterRequest
from kvferry.transfer.receive.processes import ProcessWatch
from kvferry.wire.codec import (
    Decoder,
    DecodeToPrefill,
    FetcherToLender,
    LenderToFetcher,
    PrefillToDecode,
    RouterToWorker,
    WorkerToRouter,
)
from kvferry.wire.fields import Message
from kvferry.wire.grants import ProcessMark
from kvferry.worker.roles import RoleName

from .adapters import adapter_use
from .breach import Breach
from .clients import Call
from .contents import Contents
from .disk import DiskFile
from .fabric import Fabric
from .faults import Faults, Sky
from .grammars import checked_grammar
from .kernel import Kernel
from .network import End, Network, Path
from .oracle import Oracle
from .routers import Router
from .scaling import Launcher
from .scenario import SPEC, Ask, Scenario
from .tally import Tally
from .trace import brief
from .workers import Worker

if TYPE_CHECKING:
    from .kernel import Process

SETTLE_S = WORKER_WAIT_S + 5.0  # from the last fault to rest: what no worker can hold waits for one so long
_MAX_EVENTS = 100_000  # of a scenario, whose few dozen requests make some 3,000
_LOOK_EVERY_S = 0.25
_BACK_AFTER_S = 0.1
_decoder: Decoder[Message] = Decoder(
    RouterToWorker | WorkerToRouter | PrefillToDecode | DecodeToPrefill | FetcherToLender | LenderToFetcher
)


class _ProcessWatch:
    """Implements `transfer.receive.processes.ProcessWatch`."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes

    @property
    def has_ended(self) -> bool:
        return all(process.is_dead for process in self._processes)

    def close(self) -> None:
        """Nothing is held."""


class World:
    """Not reusable: one run."""

    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.kernel = Kernel(scenario.seed, trace)
        self.sky = Sky(self.kernel, scenario)
        self.network = Network(self.kernel, _decoder, self.sky, self._tap)
        self.fabric = Fabric(
            self.kernel, self.sky, self.data_path, copy_share=scenario.copy_share, read_s=scenario.read_s
        )
        self.oracles: dict[str, Oracle] = {}
        self.addresses: dict[str, Worker] = {}  # every handoff address that ever was
        self.calls: list[Call] = []
        self._asks: dict[Call, Ask] = {}
        self._num_coming_back = 0  # clients
        self.contents = Contents(scenario.spec, SPEC.num_layers if scenario.keeps_states else scenario.spec.num_layers)
        self.disks: dict[str, DiskFile] = {}
        self.poison: Counter[str] = Counter()  # how many workers each poisonous request has killed
        self.tally = Tally(num_requests=len(scenario.asks))
        self._processes: list[Process] = []
        self._classes = RequestClasses.from_config(scenario.router)
        self.routers: list[Router] = []
        self.workers: dict[str, Worker] = {}
        self.launcher = Launcher(self) if scenario.router.autoscale.mode == "on" else None
        for number in range(scenario.num_routers):
            self.routers.append(self._new_router(number))
        for place in scenario.workers:
            self.start(place)
        self.faults = Faults(self)
        for number, ask in enumerate(scenario.asks):
            self.kernel.at(ask.at_s, self._submit, number, ask)
        self.kernel.at(scenario.calm_at_s, self.sky.calm)
        if self.launcher is None:
            self.kernel.at(scenario.calm_at_s, self._bring_home)

    # --- paths ----------------------------------------------------------------------------------------------

    def data_path(self, a: str, b: str) -> Path:
        return self.network.path(f"{a}/data", f"{b}/data", delay_s=0.001)

    def paths_of(self, place: str) -> list[Path]:
        """Every path that there is to a place."""
        return [path for path in self.network.paths() if place in path.name.replace("/data", "").split("~")]

    def draw_step_s(self, num_tokens: int) -> float:
        scenario = self.scenario
        return (scenario.step_s + scenario.s_per_token * num_tokens) * (0.75 + 0.5 * self.kernel.random.random())

    # --- lives ----------------------------------------------------------------------------------------------

    def _new_router(self, number: int) -> Router:
        router_id = f"router-{self.kernel.random.getrandbits(48):012x}"
        scenario = self.scenario
        return Router(
            self.kernel,
            f"r-{number}",
            router_id,
            scenario.router,
            self.tally.seen,
            fetch_share=scenario.fetch_share,
            launcher=self.launcher,
        )

    def start(self, place: str) -> None:
        """A new life of a worker."""
        number, incarnation = int(place[2:]), self.kernel.random.getrandbits(60)
        self.kernel.say(f"{place} starts as {incarnation:x}")
        role: RoleName = "prefill" if place.startswith("p") else "decode"
        blocks = self.scenario.prefill if role == "prefill" else self.scenario.decode
        if self.scenario.num_disk_blocks > 0:
            self.disks.setdefault(place, DiskFile(self.scenario.num_disk_blocks))
        self.workers[place] = Worker(self, place, incarnation, blocks[number % len(blocks)], role)

    def set_role(self, place: str, role: str) -> None:
        """One of the routers tells the worker."""
        for router in self.routers:
            if not router.process.is_dead and router.dispatcher.set_role(place, role):
                return

    def _bring_home(self) -> None:
        """After the last fault every worker gets its first role back: whoever changes roles asks until it is so."""
        for worker in self.workers.values():
            if worker.core.roles.active_role != worker.home:
                self.set_role(worker.place, worker.home)
        self.kernel.after(_LOOK_EVERY_S, self._bring_home)

    def kill(self, place: str, *, restart_s: float, is_silent: bool = False) -> None:
        worker = self.workers.get(place)
        if worker is not None:
            self.kill_life(worker, restart_s, is_silent)

    def kill_life(self, worker: Worker, restart_s: float, is_silent: bool = False) -> None:
        """This life ends. `is_silent`: nobody hears of it."""
        if worker.process.is_dead:
            return
        self.kernel.say(f"{worker.place} dies")
        worker.process.kill()
        if not is_silent:
            self._hang_up(worker.process, lossy=self.sky.chance(0.5))
        self.kernel.after(restart_s, self._restart, worker)

    def _restart(self, worker: Worker) -> None:
        self._hang_up(worker.process, lossy=True)
        if self.launcher is not None and self.launcher.is_leaving(worker.place):
            del self.workers[worker.place]
            self.launcher.on_ended(worker.place)
        else:
            self.start(worker.place)

    def _hang_up(self, process: Process, *, lossy: bool) -> None:
        """The host ends the connections of a process that is gone."""
        for ends in self.network.connections.values():
            for end in list(ends):
                for side in (end, end.other):
                    if side.process is process:
                        side.close(lossy=lossy)

    def on_left(self, worker: Worker) -> None:
        """It ended by itself, after a drain."""
        self._hang_up(worker.process, lossy=False)
        worker.process.kill()
        self.kernel.after(0.2, self._restart, worker)

    def kill_router(self, number: int, *, restart_s: float) -> None:
        router = self.routers[number]
        if router.process.is_dead:
            return
        router.process.kill()
        for call in router.calls.values():
            if not call.is_over:
                self._cut_off(call)
        self._hang_up(router.process, lossy=self.sky.chance(0.5))
        self.kernel.after(restart_s, self._restart_router, number)

    def _restart_router(self, number: int) -> None:
        self.routers[number] = self._new_router(number)
        if self.launcher is not None:
            self.launcher.on_event(self.routers[number], {"event": "ready"})

    def mark_of(self, process: Process) -> ProcessMark:
        """How others on its host know the process."""
        self._processes.append(process)
        host = "host" if self.scenario.copy_share else process.place
        return ProcessMark(host, len(self._processes) - 1, 0)

    def watch(self, marks: Sequence[ProcessMark]) -> ProcessWatch | None:
        """As `transfer.receive.processes.watch` for decode workers on the host of that name."""
        here = [self._processes[mark.pid] for mark in marks if mark.host == "host"]
        return _ProcessWatch(here) if here else None

    # --- clients --------------------------------------------------------------------------------------------

    def _submit(self, number: int, ask: Ask) -> None:
        request_id = f"q-{number}"
        oracle = Oracle(
            request_id,
            ask.prompt,
            ask.tenant,
            ask.sampling,
            ask.n,
            self.scenario.max_model_len,
            ask.grammar,
            ask.pooling,
            ask.adapter,
        )
        if ask.is_poison:
            self.poison[request_id] = 0
        router = self.routers[ask.router]
        self._call(Call(self.kernel, router, self._request(request_id, ask), oracle, ask.manners), ask)

    def _request(self, request_id: str, ask: Ask) -> RouterRequest:
        objectives = self._classes.named(ask.request_class)
        limits = (ask.timeout_s, objectives.deadline_s)
        return RouterRequest(
            request_id,
            list(ask.prompt),
            ask.sampling,
            n=ask.n,
            priority=ask.priority or objectives.priority,
            cache_salt=b"%d" % ask.tenant,
            tenant=str(ask.tenant),
            request_class=ask.request_class,
            objectives=objectives,
            timeout_s=min((limit_s for limit_s in limits if limit_s is not None), default=None),
            is_background=ask.is_background,
            grammar=None if ask.grammar is None else checked_grammar(ask.grammar),
            pooling=ask.pooling,
            adapter=adapter_use(ask.adapter),
        )

    def _call(self, call: Call, ask: Ask) -> None:
        self.oracles[call.request.request_id] = call.oracle
        self._asks[call] = ask
        self.calls.append(call)
        if call.router.process.is_dead:
            self._cut_off(call)
        else:
            call.router.process.run(call.router.submit, call)

    def _cut_off(self, call: Call) -> None:
        """The router of this client is dead; some come back, to whichever router is there first."""
        call.is_cut_off = True
        if self._asks[call].comes_back:
            self._num_coming_back += 1
            self.kernel.after(_BACK_AFTER_S, self._come_back, call)

    def _come_back(self, call: Call) -> None:
        router = next((router for router in self.routers if not router.process.is_dead), None)
        if router is None:
            self.kernel.after(_BACK_AFTER_S, self._come_back, call)
            return
        self._num_coming_back -= 1
        ask = self._asks[call]
        request = self._request(f"{call.request.request_id}+", ask)
        again = call.come_back(router, request)
        if request.unfinished:
            self.tally.seen["came back" if request.is_resume else "came back with nothing"] += 1
            self._call(again, ask)

    # --- points ---------------------------------------------------------------------------------------------

    def pass_point(self, point: str, worker: Worker) -> None:
        self.faults.pass_point(point, worker.place, "")

    def _tap(self, end: End, message: Message) -> None:
        name = type(message).__name__
        if self.kernel.trace is not None and name != "WorkerStatus":
            self.kernel.say(f"{end.process.name} > {end.other.process.name}: {brief(message)}")
        self.faults.pass_point(name, end.process.place, end.other.process.place)

    # --- running --------------------------------------------------------------------------------------------

    def run(self) -> Tally:
        """Until everything is at rest. Raises Breach."""
        kernel, calm_at_s = self.kernel, self.scenario.calm_at_s
        look_at_s = calm_at_s + _LOOK_EVERY_S
        try:
            while True:
                while kernel.now < look_at_s:
                    kernel.step()
                    if kernel.num_events > _MAX_EVENTS:
                        raise Breach("I16", f"{_MAX_EVENTS} events, and no end: somebody tries again without a pause")
                unrest = self._unrest()
                if not unrest:
                    break
                if kernel.now > calm_at_s + SETTLE_S:
                    raise Breach(self._late(), "; ".join(unrest))
                look_at_s = kernel.now + _LOOK_EVERY_S
            self._check_end()
        except (Breach, KeyboardInterrupt):
            raise
        except Exception as error:
            raise Breach(_broken_by(error), f"{type(error).__name__}: {error}") from error
        return self._tally()

    def _late(self) -> str:
        """Which invariant says that this should be over."""
        if any(not call.is_over for call in self.calls):
            return "I16"
        return "H8" if any(worker.has_handoffs for worker in self.workers.values()) else "I15"

    def poisoned(self, worker: Worker, request_id: str) -> None:
        """The request kills the worker that computes it.

        An attempt that ended because its worker drained, say, is none that failed, and may kill whom its end has not
        reached yet.
        """
        self.poison[request_id] += 1
        request = next(call.request for call in self.calls if call.request.request_id == request_id)
        num_unfailed = request.attempt_number + request.is_finished - request.num_failures
        if self.poison[request_id] > self.scenario.router.max_attempts + MAX_EXTRA + num_unfailed:
            raise Breach("I11", f"{request_id} has killed {self.poison[request_id]} workers")
        self.kill_life(worker, 0.3)

    def _unrest(self) -> list[str]:
        """What is not over yet."""
        found = [f"{call.request.request_id} is {call.request.status.value}" for call in self.calls if not call.is_over]
        if len(self.calls) < len(self.scenario.asks) or self._num_coming_back:
            found.append("not all requests were made")
        for worker in self.workers.values():
            if worker.process.is_dead:
                found.append(f"{worker.place} is not back")
            found += worker.leftovers()
        return found

    def _check_end(self) -> None:
        for worker in self.workers.values():
            worker.check_books()
        for call in self.calls:
            call.check_end()
            self.tally.ends[_end_of(call)] += 1
        for router in self.routers:
            router.rules.check_books()
            view = router.dispatcher.view()
            bound = sum(worker.num_bound for worker in view.workers)
            if view.num_in_flight or view.num_queued or bound:
                text = f"{router.place}: {view.num_in_flight} live, {view.num_queued} queued, {bound} bound"
                raise Breach("I15", text)

    def _tally(self) -> Tally:
        tally, seen = self.tally, self.tally.seen
        tally.num_events = self.kernel.num_events
        tally.faults = self.faults.tally
        seen["workers poisoned"] = sum(self.poison.values())
        seen["messages"] = self.network.num_messages
        seen["messages doubled"] = self.sky.num_doubled
        seen["landings"] = self.fabric.num_landings
        seen["landings of a part of each page"] = self.fabric.num_pieces
        seen["late landings"] = self.fabric.num_late
        seen["reads"] = self.fabric.num_reads
        seen["reads by other ranks"] = self.fabric.num_rank_reads
        seen["pages spoiled"] = self.fabric.num_spoiled
        seen["rotations"] = self.fabric.num_rotations
        seen["preemptions"] = sum(worker.core.roles.counters().num_preemptions for worker in self.workers.values())
        for worker in self.workers.values():
            core = worker.core
            seen["fetches"] += core.fetches.num_fetches
            seen["fetches that failed"] += core.fetches.num_failures
            for failure, number in core.fetches.failures.items():
                seen[f"fetch failed: {failure.value}"] += number
            seen["fetched blocks"] += core.fetches.num_bytes // self.scenario.spec.block_bytes()
            seen["lent blocks"] += core.lending.num_lent_blocks
            seen["drafted tokens"] += core.decode.scheduler.draft_counters.draft_tokens
            seen["accepted drafted tokens"] += core.decode.scheduler.draft_counters.accepted_tokens
            seen["draft model's prompt tokens"] += core.decode.scheduler.draft_counters.draft_prompt_tokens
            seen["promoted blocks"] += core.cache.num_promoted_blocks
            seen["demoted blocks"] += core.cache.num_demoted_blocks
        return tally


def _broken_by(error: Exception) -> str:
    """The pool asserts its own rules; any other exception is nobody's answer."""
    frames = traceback.extract_tb(error.__traceback__)
    return "I2" if isinstance(error, AssertionError) and frames[-1].filename.endswith("blocks.py") else "crash"


def _end_of(call: Call) -> str:
    if call.refusal is not None:
        return "too large" if isinstance(call.refusal, RequestError) else "refused"
    if call.is_cut_off:
        return "router died"
    return call.request.status.value + (f" {call.error_code}" if call.error_code else "")
