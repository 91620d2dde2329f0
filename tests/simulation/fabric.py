"""The one-sided writes and reads: when they land, and that they may do so when nobody expects it any more.

    write ─> Flight ─(delay)─> lands, in one piece or two ─> DONE      the ordinary case
                     └> FAILED, and lands later, in part or not at all
                     └> waits for a cut path, a stopped target, a stopped source; its source may die meanwhile

Two ways lead to a target. Through the network: what is under way outlives its source, and ends with the target's agent
(`rotate`). By a copy of the source's own CPU, on one host: it needs nothing of the target, and ends with the source's
process or agent.

What crosses are runs of each page: all of it, or the heads that both ranks have. A landing is checked before it
happens: the block must belong to the grant for which the write was posted, and the run to the same heads on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvferry.transfer.backends.base import TransferState
from kvferry.wire.codec import Decoder
from kvferry.wire.handoff import KVArrived

from .kernel import Kernel
from .network import Path

if TYPE_CHECKING:
    from .agent import Agent

_arrivals: Decoder[KVArrived] = Decoder(KVArrived)


class Right(Protocol):
    """What the target's worker says about a landing."""

    def blocks_of(self, pages: Iterable[int]) -> set[int]:
        """Return whose pages these are."""
        ...

    def check_landing(self, flight: Flight, blocks: set[int]) -> None: ...

    def lends(self, blocks: set[int]) -> bool:
        """Tell whether all of these blocks are lent to somebody now."""
        ...

    def check_fetched(self, flight: Flight, blocks: set[int], *, was_lent: bool) -> None: ...


class Weather(Protocol):
    """What becomes of writes and notifications, by faults and chance."""

    def fails(self, path: Path) -> bool: ...

    def late_s(self, path: Path) -> float: ...

    def loses(self, path: Path) -> bool: ...

    def spoils(self, path: Path) -> bool: ...

    def fails_rotation(self, place: str) -> bool: ...

    def chance(self, probability: float) -> bool: ...


class Run(NamedTuple):
    """Neighbouring tags of a page: where they stand in our page and in theirs."""

    ours: int
    theirs: int
    length: int


class Flight:
    """One write or read under way. Implements `TransferHandle`."""

    __slots__ = (
        "grant_id",
        "is_copy",
        "left",
        "needs_source",
        "num_bytes",
        "open_id",
        "pages",
        "runs",
        "snapshot",
        "source",
        "source_agent",
        "state",
        "target",
        "target_agent",
    )

    def __init__(
        self,
        source: Agent,
        target: Agent | None,
        target_agent: str,
        pages: list[tuple[int, int]],
        runs: tuple[Run, ...],
        num_bytes: int,
    ) -> None:
        self.source = source
        self.source_agent = source.agent
        self.target = target
        self.target_agent = target_agent
        self.pages = pages  # (ours, theirs)
        self.runs = runs  # of each page
        self.left = len(pages)  # that have not landed
        self.num_bytes = num_bytes
        self.state = TransferState.PENDING
        self.grant_id, self.open_id = source.writing
        self.is_copy = False
        self.needs_source = False  # a stopped source holds the bytes, a dead one loses them
        self.snapshot: list[list[int]] | None = (
            None  # the source's pages at the post, else they are read at the landing
        )

    @property
    def is_misplaced(self) -> bool:
        """Tell whether something goes to another head, or to keys instead of values, or beyond the page."""
        assert self.target is not None
        ours, theirs = self.source.memory, self.target.memory
        for run in self.runs:
            sections = ours.sections_at(run.ours, run.length)
            if sections is None or sections != theirs.sections_at(run.theirs, run.length):
                return True
        return False


class Fabric:
    """The agents by name, and the flights between them."""

    def __init__(
        self, kernel: Kernel, weather: Weather, path_of: Callable[[str, str], Path], *, copy_share: float, read_s: float
    ) -> None:
        """`copy_share`: of the writes, those that the source's own CPU makes. `read_s`: what reads take on average."""
        self.read_s = read_s
        self.kernel = kernel
        self.weather = weather
        self.path_of = path_of
        self.copy_share = copy_share
        self.agents: dict[str, Agent] = {}
        self.num_late = 0  # landings after the write had failed or its source died
        self.num_landings = 0
        self.num_pieces = 0  # landings of a part of each page
        self.num_reads = 0
        self.num_rank_reads = 0  # of them, those by other ranks than 0
        self.num_spoiled = 0
        self.num_rotations = 0

    def post(self, flight: Flight) -> None:
        """The source hands the write to its network."""
        path = self._path_of_flight(flight)
        if path is None:
            return
        flight.is_copy = self.weather.chance(self.copy_share)
        flight.needs_source = flight.is_copy or self.weather.chance(0.5)
        if self.weather.chance(0.5):
            flight.snapshot = [flight.source.memory.pages[local] for local, _ in flight.pages]
            flight.snapshot = [list(page) for page in flight.snapshot]
        delay_s = path.draw_delay() + self.weather.late_s(path)
        self._set_out(flight, path, delay_s, self._reach)

    def _path_of_flight(self, flight: Flight) -> Path | None:
        """Return the way to the target's agent; None: that is gone, and the flight fails."""
        target = flight.target
        if target is None or target.is_retired(flight.target_agent):
            self.kernel.after(0.001, self._settle, flight, TransferState.FAILED)
            return None
        return self.path_of(flight.source.place, target.place)

    def _set_out(
        self, flight: Flight, path: Path, delay_s: float, arrive: Callable[[Flight, Path, int, int], None]
    ) -> None:
        """Have pages [first, end) arrive: all at once or in two pieces; late or never where it fails."""
        kernel = self.kernel
        if self.weather.fails(path):
            kernel.after(path.draw_delay(), self._settle, flight, TransferState.FAILED)
            if self.weather.chance(0.3):
                return  # these bytes never land
            delay_s += kernel.random.expovariate(1.0)
        half = kernel.random.randrange(len(flight.pages) + 1) if self.weather.chance(0.2) else 0
        if half:
            kernel.after(delay_s * kernel.random.random(), arrive, flight, path, 0, half)
        kernel.after(delay_s, arrive, flight, path, half, len(flight.pages))

    def _reach(self, flight: Flight, path: Path, first: int, end: int) -> None:
        """Pages [first, end) come to the target, once all that they need is there."""
        if path.is_blocked and not flight.is_copy:
            path.stall(self._reach, flight, path, first, end)
        elif flight.needs_source:
            flight.source.process.run(self._cross, flight, first, end)
        else:
            self._cross(flight, first, end)

    def _cross(self, flight: Flight, first: int, end: int) -> None:
        target = flight.target
        assert target is not None
        if flight.is_copy:
            self._land(flight, first, end)
        else:
            target.process.run(self._land, flight, first, end)  # over TCP a target that does not poll takes nothing

    def _land(self, flight: Flight, first: int, end: int) -> None:
        target, source = flight.target, flight.source
        assert target is not None
        if target.process.is_dead or _is_ended(flight):
            self._settle(flight, TransferState.FAILED)
            return
        pages = flight.pages[first:end]
        if pages:
            self.num_landings += 1
            self.num_late += source.process.is_dead or flight.state is TransferState.FAILED
            target.right.check_landing(flight, target.right.blocks_of(theirs for _, theirs in pages))
            for index, (ours, theirs) in enumerate(pages, first):
                page = flight.snapshot[index] if flight.snapshot is not None else source.memory.pages[ours]
                page = self._on_path(page, [run.ours for run in flight.runs], source.place, target.place)
                slots = target.memory.pages[theirs]
                for here, there, length in flight.runs:
                    slots[there : there + length] = page[here : here + length]
            self.num_pieces += flight.runs[0].length < target.memory.page_len
        flight.left -= end - first
        if not flight.left:
            self.kernel.after(0.0001, self._settle, flight, TransferState.DONE)

    # --- reads ------------------------------------------------------------------------------------------------

    def post_read(self, flight: Flight) -> None:
        """The source asks its network for pages of the target."""
        path = self._path_of_flight(flight)
        if path is None:
            return
        delay_s = path.draw_delay() + self.weather.late_s(path)
        if self.read_s:
            delay_s += self.kernel.random.expovariate(1 / self.read_s)
        self._set_out(flight, path, delay_s, self._ask)

    def _ask(self, flight: Flight, path: Path, first: int, end: int) -> None:
        """The question for pages [first, end) comes to the target, which must run for it."""
        assert flight.target is not None
        if path.is_blocked:
            path.stall(self._ask, flight, path, first, end)
        elif flight.target.process.is_dead:
            self._settle(flight, TransferState.FAILED)
        else:
            flight.target.process.run(self._answer, flight, path, first, end)

    def _answer(self, flight: Flight, path: Path, first: int, end: int) -> None:
        """What lies in these pages now is on its way."""
        target = flight.target
        assert target is not None
        if target.is_retired(flight.target_agent):
            self._settle(flight, TransferState.FAILED)
            return
        memory, reader = target.memory, flight.source.place
        pages = flight.pages[first:end]
        was_lent = target.right.lends(target.right.blocks_of(theirs for _, theirs in pages))
        starts = [run.theirs for run in flight.runs]
        found = [self._on_path(memory.pages[theirs], starts, target.place, reader) for _, theirs in pages]
        self.kernel.after(path.draw_delay(), self._bring, flight, path, first, found, was_lent)

    def _bring(self, flight: Flight, path: Path, first: int, found: list[list[int]], was_lent: bool) -> None:
        if path.is_blocked:
            path.stall(self._bring, flight, path, first, found, was_lent)
        else:
            flight.source.process.run(self._take, flight, first, found, was_lent)

    def _take(self, flight: Flight, first: int, found: list[list[int]], was_lent: bool) -> None:
        """They land in the reader's pages, unless the agent that asked is gone."""
        source = flight.source
        if source.is_retired(flight.source_agent):
            return
        pages = flight.pages[first : first + len(found)]
        if pages:
            self.num_reads += 1
            self.num_rank_reads += source.rank > 0
            blocks = source.right.blocks_of(ours for ours, _ in pages)
            source.right.check_fetched(flight, blocks, was_lent=was_lent)
            for (ours, _), page in zip(pages, found, strict=True):
                slots = source.memory.pages[ours]
                for here, there, length in flight.runs:
                    slots[here : here + length] = page[there : there + length]
        flight.left -= len(found)
        if not flight.left:
            self.kernel.after(0.0001, self._settle, flight, TransferState.DONE)

    def _on_path(self, page: list[int], starts: list[int], a: str, b: str) -> list[int]:
        """Copy a page, as it comes to the other end. `starts`: of the runs of it that cross."""
        page = list(page)
        if self.weather.spoils(self.path_of(a, b)):
            page[starts[0] if len(starts) == 1 else self.kernel.random.choice(starts)] ^= 1
            self.num_spoiled += 1
        return page

    def _settle(self, flight: Flight, state: TransferState) -> None:
        if flight.state is TransferState.PENDING:
            flight.state = state
            flight.source.process.run(flight.source.poke)

    def end_writes(self, source: Agent) -> None:
        """The source destroys its agent: what it posted has failed for it, whatever the network still does."""
        for flight in source.pending:
            if flight.state is TransferState.PENDING:
                flight.state = TransferState.FAILED
        source.pending.clear()

    # --- notifications --------------------------------------------------------------------------------------

    def notify(self, source: Agent, name: str, payload: bytes) -> None:
        target = self.agents.get(name)
        if target is None:
            return  # lost: the peer is gone
        path = self.path_of(source.place, target.place)
        if not self.weather.loses(path):
            self.kernel.after(
                path.draw_delay() + self.weather.late_s(path) / 4, self._deliver, target, name, payload, path
            )
        if self.weather.chance(0.02):
            self.kernel.after(4 * path.draw_delay(), self._deliver, target, name, payload, path)

    def _deliver(self, target: Agent, name: str, payload: bytes, path: Path) -> None:
        if path.is_blocked:
            path.stall(self._deliver, target, name, payload, path)
        elif not target.is_retired(name):
            target.process.run(target.on_arrived, _arrivals.decode(payload))


def _is_ended(flight: Flight) -> bool:
    """The agent is gone that the bytes need: that of their target, or of the source that copies."""
    assert flight.target is not None
    if flight.is_copy:
        return flight.source.is_retired(flight.source_agent)
    return flight.target.is_retired(flight.target_agent)
