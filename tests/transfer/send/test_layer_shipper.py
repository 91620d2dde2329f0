"""The hook into an engine: what is told of a layer, and what of a GPU's work that waits for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from kvferry.common.batch import GpuEvent
from kvferry.common.config import TransferConfig
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.send.plan import ShipPlan
from kvferry.transfer.send.ranks import LayerShipper
from kvferry.transfer.send.sender import KVSender

NUM_LAYERS = 3
SPEC = KVCacheSpec(model="m", num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")


class _Layer:
    """A event that never passes."""

    def query(self) -> bool:
        return False


class _Calls:
    """Keeps what the transfer thread is asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[GpuEvent | None, str]] = []
        self.pages: list[tuple[int, list[int], list[int]]] = []  # layer, blocks of ours, blocks of theirs

    def call(self, function: Callable[..., None], *args: object) -> None:
        raise AssertionError("everything about pages is in the order of the GPU's work")

    def call_after(self, event: GpuEvent | None, function: Callable[..., None], *args: object) -> None:
        self.made.append((event, function.__name__))
        if function.__name__ == "pages_ready":
            _, layer, local, remote = args
            assert isinstance(layer, int) and isinstance(local, np.ndarray) and isinstance(remote, np.ndarray)
            self.pages.append((layer, local.tolist(), remote.tolist()))


def _sender() -> KVSender:
    return KVSender(
        rank=0,
        tp_size=1,
        worker_id="p-0",
        incarnation=1,
        version="1",
        backend=LocalBackend("p", LocalNetwork()),
        spec=SPEC,
        num_blocks=8,
        clock=FakeClock(),
        config=TransferConfig(),
        to_peer=lambda address, message: None,
        report=lambda open_id, report: None,
        source_free=lambda open_id: None,
    )


def _shipper(spec: KVCacheSpec = SPEC) -> tuple[LayerShipper, _Calls, list[_Layer]]:
    calls, events = _Calls(), list[_Layer]()

    def layer_event() -> GpuEvent:
        events.append(_Layer())
        return events[-1]

    return LayerShipper(calls, _sender(), spec, layer_event), calls, events


def test_layers_of_two_shipments_wait_for_one_fence_each() -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step([ShipPlan(1, (4,), (9,), last=True), ShipPlan(2, (5, 6), (1, 2))])
    for layer in range(NUM_LAYERS):
        shipper.on_layer(layer)
    assert len(events) == NUM_LAYERS
    told = [(event, "pages_ready") for event in events for _ in range(2)]
    told.insert(5, (events[-1], "layers_done"))
    assert calls.made == told


@pytest.mark.parametrize("plans", [[], [ShipPlan(1, (), ())]])
def test_a_step_that_completes_nothing_asks_nothing_of_the_gpu(plans: list[ShipPlan]) -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step(plans)
    for layer in range(NUM_LAYERS):
        shipper.on_layer(layer)
    assert not calls.made and not events


def test_blocks_of_earlier_steps_wait_for_nothing() -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step([ShipPlan(1, (4,), (9,), all_layers=True)])
    assert calls.made == [(None, "pages_ready")] * NUM_LAYERS and not events


def test_the_end_of_a_prompt_whose_blocks_are_all_held_is_told_behind_its_last_layer() -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step([ShipPlan(1, (), (), last=True)])
    for layer in range(NUM_LAYERS):
        shipper.on_layer(layer)
    assert calls.made == [(events[-1], "layers_done")]


def test_a_step_that_is_not_the_shipments_ships_nothing_a_second_time() -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step([ShipPlan(1, (4,), (9,))])
    for _ in range(2):  # the second one is of answers: nobody begins it here
        for layer in range(NUM_LAYERS):
            shipper.on_layer(layer)
    assert calls.made == [(event, "pages_ready") for event in events] and len(events) == NUM_LAYERS


def test_what_a_step_that_was_stopped_has_left_is_not_shipped_with_the_next_one() -> None:
    shipper, calls, events = _shipper()
    shipper.begin_step([ShipPlan(1, (4,), (9,), last=True)])
    shipper.on_layer(0)
    shipper.begin_step([])
    for layer in range(NUM_LAYERS):
        shipper.on_layer(layer)
    assert calls.made == [(events[0], "pages_ready")]


@pytest.mark.parametrize("all_layers", [False, True])
def test_layers_with_windows_ship_what_these_reach(all_layers: bool) -> None:
    shipper, calls, _ = _shipper(msgspec.structs.replace(SPEC, windows=(5, 0, 5)))
    first = ShipPlan(1, (7, 3, 5), (9, 2, 4), num_thin=2, all_layers=all_layers)
    nothing = ShipPlan(2, (1,), (8,), num_thin=1, all_layers=all_layers)
    shipper.begin_step([first, nothing])
    if not all_layers:
        for layer in range(NUM_LAYERS):
            shipper.on_layer(layer)
    all_of_first = ([3, 5, 7], [2, 4, 9])
    assert sorted(calls.pages) == [(0, [5], [4]), (1, [1], [8]), (1, *all_of_first), (2, [5], [4])]
