"""Two versions in one catalogue: each has its own requests, workers and limits, and nothing meets by mistake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from kvferry.common.errors import ConfigError, ProtocolError, RequestError
from kvferry.models.config import ModelConfig
from kvferry.router.access.keys import ApiKeys
from kvferry.router.admin.admin import Admin, build_admin
from kvferry.router.app import build_app
from kvferry.router.catalogue.adapters import AdapterNames
from kvferry.router.catalogue.catalogue import Catalogue
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected, WorkerGroup, find_group
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.state.adapter_use import AdapterUse
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect
from kvferry.wire.codec import Decoder, RouterToWorker
from kvferry.wire.fields import Message
from kvferry.wire.hello import Refused
from kvferry.wire.workers import WorkerHello

from ...adapters import write_adapter
from ...checkpoints import write_checkpoint
from ..fakes import FakeDispatcher, Inline, Script, catalogue_of, toy_tokenizer
from ..fleet import Fleet, hello, status

SMALL = ServedModel("small", 32, 260)
LARGE = ServedModel("large", 512, 260)


class Site:
    """An application over two scripted dispatchers."""

    def __init__(self) -> None:
        clock = FakeClock(100.0)
        self.small, self.large = FakeDispatcher(Script("s"), clock), FakeDispatcher(Script("l"), clock)
        parts = ((self.small, SMALL), (self.large, LARGE))
        versions = [
            version
            for dispatcher, model in parts
            for version in catalogue_of(dispatcher, model, Inline(toy_tokenizer()))
        ]
        self.catalogue = Catalogue(versions)
        self.metrics = RouterMetrics("small")
        self.app = build_app(self.catalogue, self.metrics, clock=clock, seed=1, allowed_hosts=("test",))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def ask(self, path: str = "/v1/completions", **body: object) -> dict[str, object]:
        async with self.client() as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        known: dict[str, object] = answer.json()
        return known


@pytest.mark.parametrize("name", ["small", "large"])
async def test_a_request_goes_to_the_version_that_it_names(name: str) -> None:
    site = Site()
    answer = await site.ask(model=name, prompt="hi")
    assert answer["model"] == name
    assert (len(site.small.requests), len(site.large.requests)) == ((1, 0) if name == "small" else (0, 1))
    chat = await site.ask("/v1/chat/completions", model=name, messages=[{"role": "user", "content": "hi"}])
    assert chat["model"] == name


async def test_a_request_that_names_none_goes_to_the_first() -> None:
    site = Site()
    assert (await site.ask(prompt="hi"))["model"] == "small"


async def test_each_version_has_its_own_limits() -> None:
    site = Site()
    async with site.client() as client:
        answer = await client.post("/v1/completions", json={"model": "small", "prompt": "x" * 40})
    assert answer.status_code == 400 and "32" in answer.json()["error"]["message"]
    assert (await site.ask(model="large", prompt="x" * 40))["model"] == "large"
    assert (await site.ask("/tokenize", model="large", prompt="hi"))["max_model_len"] == 512


async def test_an_unknown_model_is_told_what_there_is() -> None:
    site = Site()
    with pytest.raises(RequestError, match="'other' does not exist; this server has 'small', 'large'"):
        site.catalogue.version("other")


async def test_names_have_bounds_and_not_all_of_many_are_told() -> None:
    catalogue, use = Site().catalogue, AdapterUse("d", "/a", 1)
    for name in ("", "x" * 257, "a\nb"):
        with pytest.raises(ConfigError, match="1 to 256 printable characters"):
            catalogue.add_adapter(name, use)
    for number in range(40):
        catalogue.add_adapter(f"{number:0256}", use)
    with pytest.raises(RequestError, match="'other' does not exist") as told:
        catalogue.version("other")
    assert str(told.value).count("'") == 2 * (1 + 32)
    assert catalogue.max_model_len == 512  # the longest of all: frames have room for it


async def test_a_model_has_further_names() -> None:
    site = Site()
    site.catalogue.add_alias("latest", "large")
    assert (await site.ask(model="latest", prompt="x" * 40))["model"] == "large"
    async with site.client() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["root"]) for model in listed][1:] == [("large", "large"), ("latest", "large")]
        assert (await client.get("/v1/models/latest")).json() == listed[2]
    with pytest.raises(ConfigError, match="'latest' is the name of the model"):
        site.catalogue.add_adapter("latest", AdapterUse("d", "/a", 1))
    site.catalogue.add_adapter("red", AdapterUse("d", "/a", 1), "latest")
    assert site.catalogue.version("red").parent == "large"
    assert [name for name, _ in site.catalogue.views()] == ["small", "large"]


async def test_every_version_is_listed() -> None:
    async with Site().client() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in listed] == [("small", 32), ("large", 512)]
        assert (await client.get("/v1/models/large")).json()["id"] == "large"


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a", "a" * 300, "a\0b", "/nowhere"])
async def test_an_adapter_that_cannot_be_there_is_a_400(path: str, tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False))
    adapters = AdapterNames(Site().catalogue, model, 8)
    with pytest.raises(RequestError) as refusal:
        await adapters.load("a", path, in_place=False)
    assert (refusal.value.status, refusal.value.param) == (400, "lora_path")


async def test_adapters_whose_files_do_not_open_keep_neither_other_names_nor_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount that hangs; what has the name of one of them waits for it."""
    model_dir = write_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
    good = write_adapter(tmp_path / "good", model_dir, rank=4)
    opens, is_file = threading.Event(), Path.is_file

    def is_file_or_hangs(path: Path) -> bool:
        return opens.wait() if "hangs" in path.parts else is_file(path)

    monkeypatch.setattr(Path, "is_file", is_file_or_hangs)
    adapters = AdapterNames(Site().catalogue, ModelConfig.from_dir(model_dir), 8)

    def load(name: str) -> asyncio.Task[None]:
        return asyncio.create_task(adapters.load(name, str(tmp_path / "hangs"), in_place=False))

    loads = [load("a")]
    try:
        async with asyncio.timeout(60):
            await adapters.load("b", str(good), in_place=False)
            await adapters.unload("b")
            loads += [load(f"c{number}") for number in range(40)]
            await asyncio.sleep(0)
            assert await asyncio.to_thread(lambda: "done") == "done"
            removal = asyncio.create_task(adapters.unload("a"))
            assert not (await asyncio.wait([removal], timeout=0.05))[0]
    finally:
        opens.set()
    ends = await asyncio.gather(*loads, removal, return_exceptions=True)
    assert all(isinstance(end, RequestError) for end in ends)


async def test_the_router_is_ready_when_every_version_is() -> None:
    site = Site()
    site.large.reasons = ["no decode worker is ready"]
    async with site.client() as client:
        answer = await client.get("/ready")
    assert answer.status_code == 503 and answer.json()["reasons"] == ["no decode worker is ready"]


# --- workers ----------------------------------------------------------------------------------------------------


def groups() -> list[WorkerGroup]:
    names = ("small", "large")
    return [WorkerGroup(Expected(version="0", model=name), Fleet().dispatcher) for name in names]


def nobody(_group: WorkerGroup) -> None:
    return None


def test_a_worker_belongs_to_the_group_of_its_model() -> None:
    small, large = groups()
    assert find_group(hello("d-0", "decode", model="small"), [small, large], nobody) is small
    assert find_group(hello("d-0", "decode", model="large"), [small, large], nobody) is large


def test_a_worker_that_fits_nowhere_is_told_what_its_own_model_asks_for() -> None:
    with pytest.raises(ProtocolError, match="version '9' of worker d-0 is not the router's '0'"):
        find_group(hello("d-0", "decode", model="large", version="9"), groups(), nobody)
    with pytest.raises(ProtocolError, match="model 'other' of worker d-0 is not the router's 'small'"):
        find_group(hello("d-0", "decode", model="other"), groups(), nobody)


def test_workers_of_one_model_and_another_spec_are_not_peers() -> None:
    small, large = groups()
    peers: dict[WorkerGroup, WorkerHello] = {small: hello("d-1", "decode", model="small", max_model_len=7)}
    assert find_group(hello("d-0", "decode", model="large"), [small, large], peers.get) is large
    with pytest.raises(ProtocolError, match="max_model_len 1024"):
        find_group(hello("d-0", "decode", model="small"), [small, large], peers.get)


@asynccontextmanager
async def control(catalogue: list[WorkerGroup]) -> AsyncIterator[Address]:
    server = ControlServer(catalogue, router_id="r-0")
    address = await server.start(Address("127.0.0.1", 0))
    try:
        yield address
    finally:
        await server.close()


async def join(address: Address, worker_id: str, model: str) -> Channel:
    channel = await connect(address, worker_id)
    channel.send(hello(worker_id, "decode", model=model))
    channel.send(status())
    return channel


def workers(dispatcher: Dispatcher) -> list[str]:
    return [worker.worker_id for worker in dispatcher.view().workers]


async def test_workers_of_two_models_share_a_control_server_and_nothing_else() -> None:
    small, large = groups()
    decoder: Decoder[Message] = Decoder(RouterToWorker)
    async with control([small, large]) as address:
        first, second = await join(address, "s-0", "small"), await join(address, "l-0", "large")
        stranger = await join(address, "x-0", "other")
        refused = decoder.decode(await stranger.recv())
        assert isinstance(refused, Refused) and "'other'" in refused.reason
        assert workers(small.dispatcher) == ["s-0"] and workers(large.dispatcher) == ["l-0"]
        for channel in (first, second, stranger):
            await channel.close()


# --- operators --------------------------------------------------------------------------------------------------


async def test_operators_see_and_drain_the_workers_of_every_version() -> None:
    fleets = [Fleet(), Fleet()]
    fleets[0].join("s-0")
    fleets[1].join("l-0")
    app = build_admin(Admin([fleet.dispatcher for fleet in fleets], lambda: lambda: (b"", ""), 30.0, None), ApiKeys())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9") as client:
        known = (await client.get("/admin/workers")).json()
        assert [worker["worker_id"] for worker in known["workers"]] == ["s-0", "l-0"]
        assert (await client.post("/admin/workers/l-0/drain")).status_code == 202
        assert (await client.post("/admin/workers/x-0/drain")).status_code == 404


def test_gauges_name_the_model_of_each_worker() -> None:
    fleets = {"small": Fleet(), "large": Fleet()}
    fleets["small"].join("s-0")
    fleets["large"].join("l-0")
    models = [(name, fleet.dispatcher.view()) for name, fleet in fleets.items()]
    text = RouterMetrics("small").scrape(models, num_in_flight=0)()[0].decode()
    assert 'vllm:num_requests_running{engine="s-0",model_name="small"}' in text
    assert 'vllm:num_requests_running{engine="l-0",model_name="large"}' in text
    assert text.count("# TYPE kvferry_queued_requests gauge") == 1
