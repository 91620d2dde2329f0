"""Who of a request's two workers keeps its prompt's KV."""

from __future__ import annotations

from kvferry.simulator import Fleet, Router, Scenario, Traffic
from kvferry.simulator.world import World
from kvferry.tools.load.traces import TraceRow

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
