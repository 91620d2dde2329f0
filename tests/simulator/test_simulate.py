"""Whole runs: determinism, conservation, failures, role changes, and one request computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvferry.common.router_config import AutoscaleConfig, PoolBounds
from kvferry.simulator import (
    Adapters,
    Failure,
    Goals,
    RoleChange,
    Router,
    Scaled,
    Scenario,
    Spike,
    Traffic,
    capacity,
    simulate,
)
from kvferry.simulator.adapters import AdapterChoice
from kvferry.simulator.costs.network import Link, Network, Port
from kvferry.simulator.traffic import mean_rate
from kvferry.sizing.steps import StepWork
from kvferry.tools.load.traces import TraceRow

from .runs import azure, mooncake, one_request, run


def test_equal_scenarios_have_equal_outcomes() -> None:
    scenario = azure(rate_per_s=14.0, num_blocks=900, block_tokens=16)
    first, second = simulate(scenario), simulate(scenario)
    assert first.requests == second.requests
    assert first.fleet == second.fleet
    assert first.num_events == second.num_events


def test_good_requests_of_one_moment_are_those_of_a_second() -> None:
    rows = (TraceRow(0.0, 100, 5),) * 3
    outcome = simulate(replace(azure(), traffic=Traffic(rows)))
    assert (outcome.span_s, outcome.attainment) == (0.0, 1.0)
    assert outcome.goodput_per_s == outcome.requests_per_s == mean_rate(rows) == 3.0


@pytest.mark.parametrize(
    ("policy", "scenario"),
    [
        ("slo", azure(num_requests=70)),
        ("least_loaded", azure(num_requests=70, prefill=0)),
        ("slo", azure(rate_per_s=14.0, num_requests=120, prefill=1, decode=1, num_blocks=700, block_tokens=16)),
        ("least_loaded", mooncake(num_requests=40)),
        ("slo", mooncake(num_requests=40, num_blocks=150, prefill=0, decode=3)),
        ("least_loaded", mooncake(num_blocks=200, host_blocks=400, num_requests=60)),
        ("slo", mooncake(num_blocks=200, host_blocks=400, num_requests=60)),
        ("slo", mooncake(num_requests=40, num_blocks=150, host_blocks=200, prefill=0, decode=3)),
        ("least_loaded", azure(num_requests=70, adapters=Adapters(12, max_loras=3, max_cpu_loras=5))),
        ("slo", azure(num_requests=70, adapters=Adapters(12, num_bytes=10**9, max_loras=2), prefill=0)),
    ],
    ids=[
        *("split", "colocated", "full", "shared prefixes", "evictions", "host memory", "host memory, slo"),
        *("host memory, colocated", "adapters", "adapters, colocated"),
    ],
)
def test_a_jump_over_decode_steps_changes_nothing(policy: str, scenario: Scenario) -> None:
    """Jumps are the workers': each kind of those is beside one of the policies, the one with most waits beside both."""
    scenario = replace(scenario, router=Router(policy=policy))
    jumped, stepped = simulate(scenario), simulate(replace(scenario, jumps=False))
    assert jumped.num_events < stepped.num_events
    assert len(jumped.requests) == len(stepped.requests)
    for one, other in zip(jumped.requests, stepped.requests, strict=True):
        assert (one.ended, one.num_output_tokens, one.num_cached_tokens) == (
            other.ended,
            other.num_output_tokens,
            other.num_cached_tokens,
        )
        assert (one.ttft_s, one.tpot_s, one.end_s) == pytest.approx((other.ttft_s, other.tpot_s, other.end_s))
    assert jumped.num_preemptions == stepped.num_preemptions


def test_an_adapter_is_loaded_once_and_its_blocks_are_its_own() -> None:
    """The second request with it does not wait; another adapter's finds no block of the same prompt."""
    rows = tuple(TraceRow(8.0 * number, 5120, 2, tuple(range(10))) for number in range(12))
    fleet = replace(TIERS.fleet, prefill=0, decode=1, num_blocks=200, adapters=Adapters(2, num_bytes=10**9))
    scenario = Scenario(traffic=Traffic(rows), fleet=fleet, router=Router(knows_objectives=False))
    world, outcome = run(scenario)
    (worker,) = world.workers.values()
    drawn = AdapterChoice(fleet.adapters, 0)
    names = [drawn.draw() for _ in rows]
    assert set(names) == {1, 2} and outcome.num_adapter_loads == 2
    plain = run(replace(scenario, fleet=replace(fleet, adapters=Adapters(0))))[1].requests
    for number, request in enumerate(outcome.requests):
        is_first = names[number] not in names[:number]
        assert (request.num_cached_tokens == 0) == is_first
        beside = plain[0 if is_first else 1].ttft_s
        assert request.ttft_s is not None and beside is not None
        assert request.ttft_s - beside == pytest.approx(0.51 if is_first else 0.0, abs=1e-3)
    assert worker.core.adapters is not None
    worker.core.adapters.check()


def test_placement_prefers_who_holds_the_adapter() -> None:
    """Many more adapters than slots: a policy that knows who has which loads a fraction, and more is in time."""
    scenario = azure(rate_per_s=8.0, prefill=0, decode=4, adapters=Adapters(16, num_bytes=10**9, max_loras=4))
    knowing, blind = (simulate(replace(scenario, router=Router(policy=name))) for name in ("slo", "round_robin"))
    assert knowing.num_adapter_loads < blind.num_adapter_loads / 2
    assert knowing.attainment >= blind.attainment


TIERS = mooncake(num_blocks=200, host_blocks=400, num_requests=100)


def test_what_has_left_the_device_is_found_in_host_memory() -> None:
    rows = tuple(TraceRow(8.0 * n, 5120, 2, tuple(range(1000 * (n % 3), 1000 * (n % 3) + 10))) for n in range(9))
    fleet = replace(TIERS.fleet, prefill=0, decode=1, num_blocks=22, host_blocks=60)
    scenario = Scenario(traffic=Traffic(rows), fleet=fleet, router=Router(knows_objectives=False))
    world, outcome = run(scenario)
    _, without = run(replace(scenario, fleet=replace(fleet, host_blocks=0)))
    assert [request.num_cached_tokens for request in outcome.requests] == [0, 0, 0, *[9 * 512] * 6]
    assert without.hit_rate < outcome.hit_rate / 2
    (worker,) = world.workers.values()
    assert worker.cache.num_promoted_blocks > 0
    worker.cache.check()
    # A promoted block costs its copy and no computing.
    first, again = outcome.requests[0].ttft_s, outcome.requests[3].ttft_s
    assert first is not None and again is not None and 9 * world.spec.copy_s < again < first


@pytest.mark.parametrize(
    "scenario",
    [
        *(azure(), azure(prefill=0, rate_per_s=30.0), mooncake(rate_per_s=20.0), mooncake(num_blocks=120), TIERS),
        azure(rate_per_s=30.0, adapters=Adapters(30, max_loras=2, max_cpu_loras=4)),
    ],
    ids=["azure", "overloaded", "mooncake overloaded", "small pools", "host memory", "adapters overloaded"],
)
def test_every_request_ends_once_and_gives_its_blocks_back(scenario: Scenario) -> None:
    world, outcome = run(scenario)
    assert world.leftovers() == []
    assert [request.number for request in outcome.requests] == list(range(scenario.traffic.num_requests or 0))
    assert outcome.ended.get("lost", 0) == 0
    for request in outcome.finished:
        assert request.ttft_s is not None and request.ttft_s > 0


def test_one_request_takes_what_its_steps_and_its_transfer_take() -> None:
    scenario = one_request(400, 5)
    world, outcome = run(scenario)
    (request,) = outcome.requests
    steps, spec = world.spec.steps, world.spec
    prefill_s = steps.step_s(StepWork(400, 400 * 200))
    assert request.ttft_s == pytest.approx(prefill_s)
    assert request.unloaded_s == pytest.approx(prefill_s)
    link = scenario.fleet.network.default
    num_shipped = spec.kv.num_blocks_for(400) * spec.kv.block_size  # whole pages, also the one that is partly filled
    exposed_s = num_shipped * spec.fleet.kv_token_bytes / link.bytes_per_s / spec.kv.num_layers + link.latency_s
    decode_s = sum(steps.step_s(StepWork(0, 0, 1, 401 + number)) for number in range(4))
    assert request.end_s == pytest.approx(request.arrival_s + prefill_s + exposed_s + decode_s)
    assert request.tpot_s == pytest.approx((exposed_s + decode_s) / 4)


def test_a_long_prompt_is_computed_in_chunks_whose_transfer_hides_behind_them() -> None:
    scenario = one_request(20000, 2)
    _world, outcome = run(scenario)
    (request,) = outcome.requests
    assert request.ttft_s is not None
    assert request.ttft_s == pytest.approx(request.unloaded_s, rel=0.1)  # the scheduler cuts steps by their time
    assert request.tpot_s is not None and request.tpot_s < 0.05


def test_a_colocated_worker_computes_the_prompt_itself() -> None:
    world, outcome = run(one_request(1000, 3, prefill=0))
    (request,) = outcome.requests
    assert request.is_local
    assert request.ttft_s == pytest.approx(world.spec.steps.step_s(StepWork(1000, 1000 * 500)))


def test_an_answer_of_one_token_needs_no_decode_step() -> None:
    world, outcome = run(one_request(100, 1))
    (request,) = outcome.requests
    assert request.ended == "finished" and request.tpot_s is None
    assert world.leftovers() == []


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_the_loss_of_a_worker_loses_no_request(worker: str) -> None:
    scenario = replace(
        azure(rate_per_s=60.0, num_requests=150),
        failures=(Failure(worker, 2.5, back_after_s=1.0),),
        router=Router(knows_objectives=False),
    )
    world, outcome = run(scenario)
    assert outcome.ended == {"finished": 150}
    assert outcome.num_retries > 0
    assert world.leftovers() == []
    assert all(request.num_output_tokens > 0 for request in outcome.requests)


def test_a_worker_that_is_back_at_once_is_where_it_was() -> None:
    """It joins when its session has ended, and has the labels of its place in the fleet."""
    scenario = replace(
        azure(labels=lambda number: (("rack", str(number)),)), failures=(Failure("prefill-0", 2.5, 0.0),)
    )
    world, outcome = run(scenario)
    assert outcome.ended == {"finished": 120} and not outcome.idle_failures
    assert world.workers["prefill-0"].address == "prefill-0#2"
    assert world.workers["prefill-0"].labels == (("rack", "0"),)


def test_what_a_lost_worker_was_writing_into_is_fenced_before_it_is_used_again() -> None:
    scenario = replace(
        azure(rate_per_s=60.0, num_requests=150),
        failures=(Failure("prefill-0", 2.5, back_after_s=1.0),),
        router=Router(knows_objectives=False),
    )
    world, _outcome = run(scenario)
    receivers = [worker.core.receiver for worker in world.workers.values()]
    assert sum(receiver.counters.num_failures for receiver in receivers) > 0
    assert sum(receiver.rotation.timer.num_rotations for receiver in receivers) > 0
    assert world.leftovers(after_s=15.0) == []
    assert not any(receiver.num_live for receiver in receivers), "nothing is left in quarantine"
    # Who has lost nothing here is not refused for what another has left.
    assert not any(receiver.counters.grant_rejects["fenced_peer"] for receiver in receivers)


def test_streams_of_a_lost_decode_worker_go_on_where_they_were() -> None:
    row = TraceRow(0.0, 500, 200)
    scenario = Scenario(
        traffic=Traffic((row,)),
        fleet=azure().fleet,
        failures=(Failure("decode-0", 2.0), Failure("decode-1", 4.0, back_after_s=0.5)),
        router=Router(knows_objectives=False),
    )
    _world, outcome = run(scenario)
    (request,) = outcome.requests
    assert request.ended == "finished" and request.num_output_tokens == 200
    assert request.ttft_s is not None and request.ttft_s < 1.0
    assert request.num_attempts >= 2


def test_a_worker_takes_work_of_its_new_role_and_ends_what_it_has() -> None:
    scenario = replace(
        azure(num_requests=150),
        role_changes=(RoleChange("decode-1", 5.0, "prefill"), RoleChange("prefill-0", 9.0, "decode")),
        router=Router(knows_objectives=False),
    )
    world, outcome = run(scenario)
    assert outcome.ended == {"finished": 150}
    assert world.leftovers() == []
    assert {worker.worker_id for worker in world.workers.values() if worker.role == "decode"} == {
        "decode-0",
        "prefill-0",
    }


def test_prompts_with_a_common_beginning_compute_it_once() -> None:
    rows = tuple(TraceRow(4.0 * number, 2560, 4, block_ids=(1, 2, 3, 4, 10 + number)) for number in range(3))
    scenario = Scenario(traffic=Traffic(rows), fleet=replace(azure().fleet, prefill=1, decode=1))
    outcome = simulate(scenario)
    assert [request.num_cached_tokens for request in outcome.requests] == [0, 2048, 2048]
    assert outcome.hit_rate == pytest.approx(2 * 2048 / (3 * 2560))


def test_goodput_counts_requests_that_met_both_objectives() -> None:
    scenario = replace(azure(), goals=Goals(ttft_s=1e-9, ttft_stretch=1e-9), router=Router(knows_objectives=False))
    outcome = simulate(scenario)
    assert outcome.num_good == 0 and outcome.ended == {"finished": 120}
    assert outcome.missed["ttft"] == 120


def test_a_spike_makes_arrivals_denser_for_its_time() -> None:
    scenario = azure(rate_per_s=5.0, num_requests=300)
    spiked = replace(scenario, traffic=replace(scenario.traffic, spikes=(Spike(5.0, 4.0, 10.0),)))
    plain, outcome = simulate(scenario), simulate(spiked)
    dense, sparse = (sum(6.0 <= each.arrival_s < 10.0 for each in one.requests) for one in (outcome, plain))
    assert dense > 3 * sparse


def test_capacity_lies_between_a_rate_that_is_kept_and_one_that_is_not() -> None:
    found = capacity(azure(num_requests=80, prefill=1, decode=1), precision=0.2, start_per_s=8.0)
    assert found.outcome is not None and found.outcome.attainment >= 0.9
    kept = [rate for rate, share in found.tried if share >= 0.9]
    missed = [rate for rate, share in found.tried if share < 0.9]
    assert max(kept) == found.rate_per_s < min(missed)


def test_an_autoscaled_fleet_grows_with_the_load_and_costs_what_it_had() -> None:
    most = PoolBounds(at_least=1, at_most=4)
    config = AutoscaleConfig(mode="on", prefill=most, decode=most, max_workers=8)
    scenario = replace(
        azure(rate_per_s=40.0, num_requests=600, prefill=1, decode=1), scaled=Scaled(config, start_s=5.0)
    )
    world, outcome = run(scenario)
    assert world.leftovers() == []
    most_workers = max(sample.num_prefill + sample.num_decode for sample in outcome.fleet)
    assert most_workers > 2
    gpus = scenario.fleet.gpus_per_worker
    assert 2 * gpus * outcome.span_s / 3600 < outcome.gpu_hours < most_workers * gpus * outcome.end_s / 3600


def test_an_even_stream_is_across_a_layer_after_its_end() -> None:
    port = Port()
    assert port.stream(10.0, 11.0, 0.1, 10) == pytest.approx(11.01)
    assert port.stream(10.0, 11.0, 0.1, 10) == pytest.approx(11.01)  # the port had room for both
    assert port.stream(10.0, 11.0, 2.0, 10) == pytest.approx(12.3)  # 2.2 s of bytes since 10.1
    assert port.carry(12.0, 0.5) == pytest.approx(12.8)


def test_the_narrowest_common_place_decides_which_path_is_taken() -> None:
    far, rack, host = Link(1e9, 0.01), Link(1e10, 0.001), Link(1e11, 0.0001)
    network = Network(far, (("rack", rack), ("host", host)))
    here = (("rack", "a"), ("host", "1"))
    assert network.between(here, here) is host
    assert network.between(here, (("rack", "a"), ("host", "2"))) is rack
    assert network.between(here, ()) is far
