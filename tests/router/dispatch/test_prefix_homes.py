"""Who of a request's two workers keeps its prompt's KV."""

from __future__ import annotations

from kvferry.common.request import SamplingParams
from kvferry.router.dispatch.prefix_homes import PrefixHomes
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.worker import RouterWorker
from kvferry.simulator import Fleet, Router, Scenario, Traffic
from kvferry.simulator.world import World
from kvferry.tools.load.traces import TraceRow
from kvferry.wire.workers import CacheChange

from ..fleet import Fleet as ScriptedFleet

PROMPT = tuple(range(1, 11))


def _world(rows: tuple[TraceRow, ...]) -> World:
    scenario = Scenario(
        traffic=Traffic(rows),
        fleet=Fleet(prefill=1, decode=1, num_blocks=60, prefix_caching=True),
        router=Router(policy="least_loaded", local_prefill=False, knows_objectives=False),
    )
    world = World(scenario)
    world.run()
    return world


def _spare(world: World) -> dict[str, int]:
    return {worker.role: sum(map(worker.pool.is_spare, range(60))) for worker in world.workers.values()}


def test_one_of_both_copies_is_spare() -> None:
    spare = _spare(_world((TraceRow(0.0, 5120, 4, PROMPT),)))
    assert sorted(spare.values()) == [0, 10]


def test_a_second_turn_is_kept_where_the_first_one_is() -> None:
    first = TraceRow(0.0, 5120, 4, PROMPT)
    second = TraceRow(8.0, 7680, 4, (*PROMPT, 11, 12, 13, 14, 15))
    before, after = _spare(_world((first,))), _spare(_world((first, second)))
    (side,) = [role for role, count in before.items() if count]
    assert after[side] == 15 and sum(after.values()) == 15


def test_new_prompts_go_to_both_sides() -> None:
    rows = tuple(TraceRow(8.0 * n, 2560, 4, tuple(range(100 * n, 100 * n + 5))) for n in range(6))
    assert _spare(_world(rows)) == {"prefill": 15, "decode": 15}


def _prompts(count: int) -> list[RouterRequest]:
    """Prompts of three blocks that have nothing in common."""
    sampling = SamplingParams(max_tokens=1)
    names = [[bytes([number, block]) * 8 for block in range(3)] for number in range(count)]
    return [RouterRequest("r", range(48), sampling, block_hashes=hashes) for hashes in names]


def _pair(fleet: ScriptedFleet, *names: str) -> list[RouterWorker]:
    return [worker for name in names if (worker := fleet.dispatcher._pools.named(name)) is not None]


def test_new_prompts_go_where_there_is_more_room() -> None:
    fleet = ScriptedFleet()
    fleet.join("p-0")
    fleet.beat(fleet.join("d-0", num_blocks=4096), num_free_blocks=4096)
    homes, (p, d) = PrefixHomes(fleet.dispatcher._pools), _pair(fleet, "p-0", "d-0")
    assert [homes.decode_retains(prompt, p, d) for prompt in _prompts(4)] == [False, True, True, True]


def test_what_a_third_worker_retains_is_nobodys_of_the_two() -> None:
    fleet = ScriptedFleet()
    _, _, link = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    homes, (p0, p1, d) = PrefixHomes(fleet.dispatcher._pools), _pair(fleet, "p-0", "p-1", "d-0")
    prompt, other = _prompts(2)
    assert homes.decode_retains(prompt, p1, d) is False
    fleet.dispatcher.on_message(link, CacheChange(seq=0, stored=b"".join(prompt.block_hashes), evicted=b""))
    homes.note_local(other, p0)
    assert homes.decode_retains(prompt, p0, d) is True


def test_the_prompts_that_came_last_are_remembered() -> None:
    fleet = ScriptedFleet()
    fleet.join("d-0")
    homes, (d,) = PrefixHomes(fleet.dispatcher._pools, max_prompts=2), _pair(fleet, "d-0")
    first, second, third = _prompts(3)
    for prompt in (first, second, first, third):
        homes.note_local(prompt, d)
    assert list(homes._session_of) == [first.block_hashes[-1], third.block_hashes[-1]]
