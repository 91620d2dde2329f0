"""Fresh ids, bounds, GPUs and places on the core board."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.cores import CoreBoard
from kvferry.common.errors import ConfigError
from kvferry.launch.fleet import Fleet
from kvferry.launch.host import Gpu, Host
from kvferry.launch.plan import Deployment, fit_to_host, plan, plan_autoscale
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings

GPUS = tuple(Gpu(str(index), "", 80 << 30, 80 << 30) for index in range(4))


def deployment(*, gpus: tuple[Gpu, ...] = (), prefill_max: int | None = 2, decode_max: int | None = 3) -> Deployment:
    settings = ServeSettings(
        prefill=PoolSettings(workers=1, max_workers=prefill_max), decode=PoolSettings(workers=1, max_workers=decode_max)
    )
    host = Host(num_cpus=8, free_memory_bytes=8 << 30, gpus=gpus)
    return fit_to_host(plan(settings, Path("model"), "m"), host)


def test_ids_are_never_given_twice() -> None:
    fleet = Fleet(deployment())
    added = fleet.add("decode")
    assert added is not None and added.config.worker_id == "d-1"
    assert fleet.leave("d-1")
    fleet.forget("d-1")
    again = fleet.add("decode")
    assert again is not None and again.config.worker_id == "d-2"


def test_the_bound_counts_those_that_stay() -> None:
    fleet = Fleet(deployment())
    assert [fleet.add("decode") is not None for _ in range(4)] == [True, True, True, False]
    assert len(fleet) == 5
    assert fleet.leave("p-0") and not fleet.leave("p-0") and not fleet.leave("x")
    assert fleet.leaving == ("p-0",) and "p-0" not in fleet.roles
    assert fleet.add("prefill") is not None


def test_a_gpu_belongs_to_one_worker_until_that_is_gone() -> None:
    fleet = Fleet(deployment(gpus=GPUS[:3]))
    added = fleet.add("decode")
    assert added is not None and added.gpus == ("2",)
    assert fleet.add("decode") is None
    assert fleet.leave("p-0")
    assert fleet.add("decode") is None
    fleet.forget("p-0")
    last = fleet.add("decode")
    assert last is not None and last.gpus == ("0",)


def test_workers_have_places_of_their_own_on_the_core_board() -> None:
    board = CoreBoard(10)
    try:
        fleet = Fleet(deployment(), board)
        fleet.add("decode")
        fleet.leave("p-0")
        fleet.forget("p-0")
        fleet.add("prefill")
        places = [plan.config.cores.slot for plan in fleet.plans if plan.config.cores is not None]
        assert sorted(places) == [0, 1, 2]
    finally:
        board.close()


@pytest.mark.parametrize(
    ("prefill", "decode", "bounds"),
    [
        ({"workers": 2}, {"workers": 3}, ((1, 4), (1, 4), 5)),
        ({"workers": 2, "max_workers": 6}, {"workers": 3}, ((1, 6), (1, 8), 9)),
        ({"workers": 0}, {"workers": 2, "max_workers": 4}, ((0, 0), (1, 4), 4)),
        (
            {"workers": 2, "min_workers": 2, "max_workers": 4},
            {"workers": 2, "min_workers": 2, "max_workers": 4},
            ((2, 4), (2, 4), 8),
        ),
    ],
)
def test_without_a_maximum_pools_share_what_they_start_with(
    prefill: dict[str, int], decode: dict[str, int], bounds: tuple[tuple[int, int], tuple[int, int], int]
) -> None:
    config = plan_autoscale(ServeSettings(prefill=PoolSettings(**prefill), decode=PoolSettings(**decode)))
    found = [(pool.at_least, pool.at_most) for pool in (config.prefill, config.decode)]
    assert (*found, config.max_workers) == bounds


@pytest.mark.parametrize("pool", [{"workers": 5, "max_workers": 4}, {"workers": 1, "min_workers": 2}])
def test_a_pool_starts_within_its_bounds(pool: dict[str, int]) -> None:
    with pytest.raises((ValueError, ConfigError), match="workers are not between"):
        ServeSettings(decode=PoolSettings(**pool))
