"""The router process: what it refuses to start with, what it reports, how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.errors import ConfigError
from kvferry.common.router_config import RouterConfig
from kvferry.launch.children import RouterChild
from kvferry.launch.process import ChildTimes
from kvferry.router.access.credentials import RouterCredentials
from kvferry.router.process import main, parse_config
from kvferry.router.server import _ADMIN_CONNECTIONS, serve_router
from kvferry.settings.exposure import check_exposure
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address

from .fakes import MODEL, write_model_dir

MODEL_CONFIG = """{
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 260, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "eos_token_id": 256, "torch_dtype": "float32"
}"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model_dir(tmp_path_factory.mktemp("model"))
    (path / "config.json").write_text(MODEL_CONFIG)
    return path


def _config(model_dir: Path, **fields: object) -> RouterConfig:
    values: dict[str, object] = {"port": 0, "model_dir": model_dir, "served_model_name": MODEL, **fields}
    return RouterConfig.model_validate(values)


class _Lifeline:
    def __init__(self) -> None:
        self.details: dict[str, object] = {}
        self.events: list[dict[str, object]] = []
        self.is_ready = asyncio.Event()
        self.beats = asyncio.Event()

    def ready(self, **details: object) -> None:
        self.details = details
        self.is_ready.set()

    def beat_with(self, lag_s: Callable[[], float]) -> None:
        self.lag_s = lag_s
        self.beats.set()

    def listen(self, on_event: Callable[[dict[str, object]], None]) -> None:
        pass  # this launcher says nothing

    def send(self, event: Mapping[str, object]) -> None:
        self.events.append(dict(event))


def _credentials(config: RouterConfig) -> RouterCredentials:
    return RouterCredentials.from_config(config, {})


async def _serve(config: RouterConfig) -> None:
    await serve_router(config, _credentials(config), None)


@asynccontextmanager
async def _running(config: RouterConfig) -> AsyncIterator[tuple[_Lifeline, asyncio.Task[int]]]:
    lifeline = _Lifeline()
    task = asyncio.create_task(serve_router(config, _credentials(config), lifeline))
    waiting = asyncio.create_task(lifeline.is_ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield lifeline, task
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await task


async def test_the_router_reports_where_it_listens_beats_and_ends_on_a_signal(model_dir: Path) -> None:
    async with _running(_config(model_dir)) as (lifeline, task):
        await lifeline.beats.wait()
        async with asyncio.timeout(30):
            before_s = 0.0
            while (lag_s := lifeline.lag_s()) >= before_s:  # it falls whenever the loop moves
                before_s = lag_s
                await asyncio.sleep(0.01)
        http, control = (Address.parse(str(lifeline.details[name])) for name in ("http", "control"))
        assert http.port and control.port and http.port != control.port
        async with httpx.AsyncClient(base_url=f"http://{http}") as client:
            models = (await client.get("/v1/models")).json()
            assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == (MODEL, 512)
            ready = await client.get("/ready")
            assert ready.status_code == 503
            assert ready.json()["reasons"] == ["no decode worker is ready", "no prefill worker is ready"]
            assert "kvferry_queued_requests 0.0" in (await client.get("/metrics")).text
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == 0
        with pytest.raises(OSError):
            await asyncio.open_connection(http.host, http.port)


async def test_the_admin_listener_has_few_connections_and_takes_no_order_once_the_router_ends(model_dir: Path) -> None:
    with listen(Address("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with (
        _running(_config(model_dir, admin_port=port)) as (lifeline, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as admin,
    ):
        http = Address.parse(str(lifeline.details["http"]))
        async with httpx.AsyncClient(base_url=f"http://{http}") as client:
            await client.get("/live")  # its connection may ask once more: so long the router stays
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(_ADMIN_CONNECTIONS)]
            assert (await admin.post("/admin/restart")).status_code == 202
            assert await idle[0][0].read() == b""  # the one that waited longest has made room
            for _, writer in idle:
                writer.close()
            os.kill(os.getpid(), signal.SIGTERM)
            counts = {"prefill": 0, "decode": 1}
            answers = [await admin.post("/admin/restart"), await admin.post("/admin/scaling", json=counts)]
    assert [answer.status_code for answer in answers] == [409, 409]
    assert [event["event"] for event in lifeline.events if event["event"] in ("restart_all", "hold")] == ["restart_all"]


async def test_a_port_in_use_is_one_clear_line(model_dir: Path) -> None:
    with listen(Address("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: cannot listen on 127.0.0.1:{port}: Address already in use"):
            await _serve(_config(model_dir, port=port))
        with pytest.raises(ConfigError, match=f"control_port: cannot listen on 127.0.0.1:{port}"):
            await _serve(_config(model_dir, control_port=port))


async def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(MODEL_CONFIG)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        await _serve(_config(tmp_path))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_machines_are_served_only_with_credentials(model_dir: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"^host: .*API key.*--api-key-file"):
        check_exposure(_config(model_dir, host=host), has_secret=True)
    check_exposure(_config(model_dir, host=host, api_key=("k",)), has_secret=False)
    check_exposure(_config(model_dir, host=host, api_key_file=model_dir / "k"), has_secret=False)
    with pytest.raises(ConfigError, match=r"^control_host: .*secret.*--secret-file"):
        check_exposure(_config(model_dir, control_host=host), has_secret=False)
    check_exposure(_config(model_dir, control_host=host), has_secret=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_operators_of_other_machines_need_a_key(model_dir: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"^admin_host: .*admin key.*--admin-key-file"):
        check_exposure(_config(model_dir, admin_host=host, admin_port=0), has_secret=True)
    check_exposure(_config(model_dir, admin_host=host), has_secret=True)  # nobody listens there
    check_exposure(_config(model_dir, admin_host=host, admin_port=0, admin_key=("k",)), has_secret=True)
    check_exposure(_config(model_dir, admin_host=host, admin_port=0, admin_key_file=model_dir / "k"), has_secret=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_is_served_without(model_dir: Path, host: str) -> None:
    check_exposure(_config(model_dir, host=host, control_host=host), has_secret=False)


def test_api_keys_come_from_the_environment_too(model_dir: Path) -> None:
    text = _config(model_dir, api_key=("a",)).model_dump_json()
    assert parse_config(text, {"KVFERRY_API_KEY": "b, c,,"}).api_key == ("a", "b", "c")
    assert parse_config(text, {}).api_key == ("a",)


def test_a_broken_configuration_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-json", '{"prot": 1}']) == 2
    assert "prot" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_says_what_is_wrong_and_exits_with_2(model_dir: Path) -> None:
    config = _config(model_dir, host="0.0.0.0").model_dump_json()
    command = [sys.executable, "-m", "kvferry.router", "--config-json", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240.0)
    assert done.returncode == 2
    assert done.stderr.startswith("kvferry: host: 0.0.0.0 is reachable from other machines")
    assert "Traceback" not in done.stderr


STUCK = """
import asyncio, sys, time
from kvferry.router import process as router

serve = router.serve_router

async def serve_and_stand_still(*args, **kwargs):
    def stand_still_soon():
        asyncio.get_running_loop().call_later(0.5, time.sleep, 600)

    return await serve(*args, **kwargs | {"on_ready": stand_still_soon})

if sys.argv[2] == "stands still":
    router.serve_router = serve_and_stand_still
sys.exit(router.main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stands still", "is stopped"])
async def test_a_router_that_hangs_is_ended_and_started_again(model_dir: Path, fault: str) -> None:
    config = _config(model_dir)
    events: list[dict[str, object]] = []
    changed = asyncio.Event()

    def note(name: str, event: dict[str, object]) -> None:
        events.append(event)
        changed.set()

    async def until(kind: str) -> dict[str, object]:
        async with asyncio.timeout(60):
            while not (found := [event for event in events if event["event"] == kind]):
                changed.clear()
                await changed.wait()
        return found[-1]

    with listen(Address("127.0.0.1", 0)) as sock:
        router = RouterChild(
            "router",
            config,
            os.environ,
            SystemClock(),
            note,
            sockets=lambda: {"--http-fd": sock},
            program=(sys.executable, "-c", STUCK, "-", fault),
            times=ChildTimes(hang_after_s=0.1, router_hang_after_s=2.0),
        )
        running = asyncio.create_task(router.child.run())
        await until("ready")
        if fault == "is stopped":
            os.kill(router.child.pid or 0, signal.SIGSTOP)
        reason = str((await until("restart"))["reason"])
        running.cancel()
        await asyncio.wait((running,))
    assert ("stood still for" if fault == "stands still" else "no sign of life for") in reason
