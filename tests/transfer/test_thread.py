"""The transfer thread: order of calls, waking, watching, failing, and a whole handoff over each network backend."""

from __future__ import annotations

import itertools
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from kvferry.common.clock import SystemClock
from kvferry.common.config import TransferConfig
from kvferry.common.errors import TransferError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.transfer.backends.base import TransferBackend
from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.thread import TransferThread
from kvferry.wire.codec import encode
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, RegionInfo
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.results import ChoiceTokens, Grant, HandoffDone
from kvferry.wire.workers import TransferReport

from ..e2e.cluster import wait_until

WAIT_S = 120.0
SPEC = KVCacheSpec(model="m", num_layers=4, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
ARRIVED = KVArrived(grant_id=GrantId("d-0", 1, 1), open_id=1, source_rank=0, num_tokens=1)
_incarnations = itertools.count(500)

set_ucx_defaults("127.0.0.1")


def _pages(num_blocks: int) -> torch.Tensor:
    return torch.zeros(SPEC.num_layers, num_blocks, 2, SPEC.num_kv_heads, SPEC.block_size, SPEC.head_dim)


def _fail(error: BaseException) -> None:
    raise AssertionError("the transfer thread failed") from error


def test_calls_run_in_order_on_the_one_thread() -> None:
    thread = TransferThread(LocalBackend("a", LocalNetwork()), on_failure=_fail)
    thread.start()
    ran: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for number in range(100):
        thread.call(lambda n: ran.put((n, threading.current_thread().name)), number)
    assert [ran.get(timeout=WAIT_S) for _ in range(100)] == [(number, "transfer") for number in range(100)]
    thread.close()
    thread.close()


class _Gpu:
    """An event that passes when it is told to."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self.asked = threading.Event()

    def query(self) -> bool:
        self.asked.set()
        return self._passed.is_set()

    def arrive(self) -> None:
        self._passed.set()


def test_calls_behind_events_wait_for_them_in_order_and_others_do_not() -> None:
    thread = TransferThread(LocalBackend("a", LocalNetwork()), on_failure=_fail)
    thread.start()
    ran: queue.SimpleQueue[str] = queue.SimpleQueue()
    first, second = _Gpu(), _Gpu()
    thread.call_after(None, ran.put, "no event before it")
    thread.call_after(first, ran.put, "first layer")
    thread.call_after(second, ran.put, "second layer")
    thread.call_after(None, ran.put, "finish")
    thread.call(ran.put, "an answer")
    assert [ran.get(timeout=WAIT_S) for _ in range(2)] == ["no event before it", "an answer"]
    second.arrive()
    assert first.asked.wait(WAIT_S) and ran.empty()
    first.arrive()
    assert [ran.get(timeout=WAIT_S) for _ in range(3)] == ["first layer", "second layer", "finish"]
    thread.close()


@pytest.mark.slow
def test_connections_that_strangers_left_hold_no_descriptors_of_an_idle_worker() -> None:
    """It is a process of its own, with one library, as a worker is: this one may have two copies of UCX."""
    script = Path(__file__).parent / "idle_worker.py"
    command = [sys.executable, str(script), f"d-0.{next(_incarnations):x}.0.0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        assert "idle\n" in iter(worker.stdout.readline, ""), "it ended"
        process = psutil.Process(worker.pid)
        [port] = {link.laddr.port for link in process.net_connections("tcp") if link.status == "LISTEN"}

        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        addresses = {stranger.getsockname() for stranger in strangers}

        def num_held() -> int:
            return sum(tuple(link.raddr) in addresses for link in process.net_connections("tcp"))

        wait_until(lambda: num_held() == len(strangers), "the strangers to be let in")
        for number, stranger in enumerate(strangers):
            stranger.send(b"x" * number)
            stranger.close()
        wait_until(lambda: num_held() == 0, "the connections to be let go")
        worker.stdin.close()
        assert worker.wait(WAIT_S) == 0


def test_a_watching_thread_hands_out_arrivals_and_drops_what_is_malformed() -> None:
    network = LocalNetwork()
    here, there = LocalBackend("a", network), LocalBackend("b", network)
    region = here.register(_pages(2), rank=0, tp_size=1, generation=0)
    there.connect(region, ())
    arrived: queue.SimpleQueue[tuple[str, KVArrived]] = queue.SimpleQueue()
    thread = TransferThread(here, on_arrived=lambda agent, message: arrived.put((agent, message)), on_failure=_fail)
    there.notify("a", b"\xc1 not a message")
    there.notify("a", encode(ARRIVED))
    thread.start()
    thread.watch(True)
    assert arrived.get(timeout=WAIT_S) == ("b", ARRIVED)
    thread.watch(False)
    thread.watch(True)
    there.notify("a", encode(ARRIVED))
    assert arrived.get(timeout=WAIT_S) == ("b", ARRIVED)
    thread.close()
    assert thread.num_malformed == 1


def test_the_thread_is_prepared_before_it_does_anything() -> None:
    seen: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = TransferThread(
        LocalBackend("a", LocalNetwork()), on_failure=_fail, prepare=lambda: seen.put(threading.current_thread().name)
    )
    thread.call(seen.put, "called")
    thread.start()
    assert [seen.get(timeout=WAIT_S) for _ in range(2)] == ["transfer", "called"]
    thread.close()


def test_what_has_arrived_is_handed_out_before_its_agent_is_replaced() -> None:
    """With the agent it would be gone: a handoff that is complete would be fenced."""
    network = LocalNetwork()
    here, there = LocalBackend("a.0.0.0", network), LocalBackend("b", network)
    region = here.register(_pages(2), rank=0, tp_size=1, generation=0)
    there.connect(region, ())
    told: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = TransferThread(here, on_arrived=lambda agent, message: told.put(message), on_failure=_fail)
    there.notify("a.0.0.0", encode(ARRIVED))
    thread.rotate(1, told.put)
    thread.start()
    assert told.get(timeout=WAIT_S) == ARRIVED
    new_region = told.get(timeout=WAIT_S)
    assert isinstance(new_region, RegionInfo) and new_region.generation == 1
    thread.close()


def test_an_exception_reaches_the_owner() -> None:
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    thread = TransferThread(LocalBackend("a", LocalNetwork()), on_failure=failed.put)
    thread.start()

    def broken() -> None:
        raise TransferError("broken", peer="d-0")

    thread.call(broken)
    assert str(failed.get(timeout=WAIT_S)) == "broken"
    thread.close()


class Handoff:
    """A prefill and a decode worker with a transfer thread each; control messages go from thread to thread."""

    def __init__(self, backend: str) -> None:
        incarnation = next(_incarnations)
        self.lock = threading.Lock()
        self.network = LocalNetwork()  # of the "local" backend
        self.routed: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[TransferReport] = queue.SimpleQueue()
        self.source, self.target = _pages(8), _pages(8)
        self.here = self._backend(backend, f"p-0.{incarnation}.0.0")
        self.there = self._backend(backend, f"d-0.{incarnation}.0.0")
        self.here.register(self.source, rank=0, tp_size=1, generation=0)
        region = self.there.register(self.target, rank=0, tp_size=1, generation=0)
        self.receiver = KVReceiver(
            worker_id="d-0",
            incarnation=1,
            spec=SPEC,
            tp_size=1,
            pool=BlockPool(8, SPEC.block_size),
            regions=(region,),
            kv_address="127.0.0.1:1",
            config=TransferConfig(),
            clock=SystemClock(),
            version="0.1.0",
            transport=backend,
            to_router=lambda router, message: self.routed.put(message),
            to_peer=self._to_prefill,
        )
        self.sender = KVSender(
            rank=0,
            tp_size=1,
            worker_id="p-0",
            incarnation=2,
            version="0.1.0",
            backend=self.here,
            spec=SPEC,
            num_blocks=8,
            clock=SystemClock(),
            config=TransferConfig(),
            to_peer=self._to_decode,
            report=lambda open_id, report: self.reports.put(report),
            source_free=lambda open_id: None,
        )
        self.decode_thread = TransferThread(self.there, on_arrived=self._on_arrived, on_failure=_fail)
        self.prefill_thread = TransferThread(self.here, sender=self.sender, on_failure=_fail)

    def _backend(self, name: str, agent: str) -> TransferBackend:
        if name == "local":
            return LocalBackend(agent, self.network)
        return open_backend(name, agent)

    def _to_decode(self, address: str, message: Message) -> None:
        assert isinstance(message, KVOpen | KVRenew | KVClosed)
        with self.lock:
            self.receiver.on_message("p-0#1", message)
            self.decode_thread.watch(self.receiver.has_open)

    def _to_prefill(self, session: str, message: Message) -> None:
        assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
        self.prefill_thread.call(self.sender.on_message, message)

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        with self.lock:
            self.receiver.on_arrived(0, message)
            self.decode_thread.watch(self.receiver.has_open)

    def close(self) -> None:
        self.prefill_thread.close()
        self.decode_thread.close()


@pytest.mark.parametrize("backend", ["local", "nixl", "ucx"])
def test_a_whole_handoff_is_byte_exact_and_accounted(backend: str) -> None:
    if backend != "local":
        pytest.importorskip("ucxx" if backend == "ucx" else "nixl_cu12", exc_type=ImportError)
    handoff = Handoff(backend)
    handoff.source.copy_(torch.rand(handoff.source.shape, generator=torch.manual_seed(5)))
    spec = RequestSpec(request_id="a", attempt=0, prompt=pack_ids(list(range(15))), sampling=SamplingParams())
    answer = handoff.receiver.reserve(spec, "r-0")
    assert isinstance(answer, Grant)
    handoff.decode_thread.start()
    handoff.prefill_thread.start()
    call: Callable[..., None] = handoff.prefill_thread.call
    call(handoff.sender.open, 77, "a", 0, answer.grant)
    local = (7, 0, 3, 4)
    for layer in range(SPEC.num_layers):
        call(handoff.sender.pages_ready, 77, layer, local, answer.grant.block_ids)
    call(handoff.sender.layers_done, 77)
    first = (ChoiceTokens(0, 0, (SampledToken(9),)),)
    call(handoff.sender.finish, 77, first)
    assert isinstance(handoff.routed.get(timeout=WAIT_S), HandoffDone)
    report = handoff.reports.get(timeout=WAIT_S)
    assert report.clean and report.num_bytes == 4 * SPEC.block_bytes() == handoff.here.telemetry_bytes
    with handoff.lock:
        reservation = handoff.receiver.arrived[0]
        assert reservation.first_tokens == first
        blocks, _ = handoff.receiver.adopt(reservation)
    assert torch.equal(handoff.target[:, blocks], handoff.source[:, list(local)])
    handoff.close()
