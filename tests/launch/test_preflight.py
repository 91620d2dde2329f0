"""Wrong set-ups that `serve`, `serve --dry-run` and `doctor` all refuse, in the same words, before anything starts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvferry.cli import main
from kvferry.common import extras
from kvferry.common.config import environment
from kvferry.common.extras import nixl
from kvferry.launch import host
from kvferry.launch.host import Host
from kvferry.launch.plan import plan
from kvferry.launch.preflight import Check, Level, Preflight, check_kernels
from kvferry.launch.running import socket_of
from kvferry.models.checkpoint import check_checkpoint, tensor_shapes
from kvferry.models.config import ModelConfig
from kvferry.settings.fields import ServeSettings

from ..adapters import write_adapter
from ..checkpoints import Shape, write_checkpoint
from ..quantized import write_pair
from ..sizing.models import write_config

Words = list[str]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "5" * 64 + "\nsize 269060552\n"


class Site(NamedTuple):
    """What a case may spoil."""

    folder: Path
    model: Path
    patch: pytest.MonkeyPatch
    stack: contextlib.ExitStack

    def file(self, name: str, text: str, mode: int = 0o600) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    def edit_config(self, **changes: object) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CASES: dict[str, tuple[Callable[[Site], Words], str]] = {}


def case(message: str) -> Callable[[Callable[[Site], Words]], Callable[[Site], Words]]:
    """A wrong set-up: the function spoils something and returns the flags that meet it."""

    def keep(spoil: Callable[[Site], Words]) -> Callable[[Site], Words]:
        CASES[spoil.__name__] = (spoil, message)
        return spoil

    return keep


@case("no model '/no/such/model'")
def missing_model(site: Site) -> Words:
    return ["/no/such/model"]


@case(r"has no config\.json")
def no_config(site: Site) -> Words:
    (site.model / "config.json").unlink()
    return []


@case("has neither model.safetensors nor")
def no_weights(site: Site) -> Words:
    (site.model / "model.safetensors").unlink()
    return []


@case(r"has \d+ bytes where its header tells of \d+")
def truncated_weights(site: Site) -> Words:
    path = site.model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return []


@case("it is not a safetensors file")
def no_safetensors(site: Site) -> Words:
    (site.model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    return []


@case(r"has 108 bytes and a header of \d+: it was cut short")
def truncated_header(site: Site) -> Words:
    os.truncate(site.model / "model.safetensors", 108)
    return []


@case(r"model\.safetensors is a pointer of Git LFS, not the file itself: run `git lfs pull`")
def weights_that_were_not_pulled(site: Site) -> Words:
    (site.model / "model.safetensors").write_text(POINTER)
    return []


@case(r"tokenizer\.json is a pointer of Git LFS")
def tokenizer_that_was_not_pulled(site: Site) -> Words:
    (site.model / "tokenizer.json").write_text(POINTER)
    return []


@case(r"q8\.gguf is a pointer of Git LFS")
def gguf_that_was_not_pulled(site: Site) -> Words:
    return [site.file("q8.gguf", POINTER)]


@case(r"tensor .* has shape \[128, 64\], config.json implies \[96, 64\]")
def wrong_shape(site: Site) -> Words:
    site.edit_config(intermediate_size=96)
    return []


@case("9 tensors are missing")
def missing_layer(site: Site) -> Words:
    site.edit_config(num_hidden_layers=3)
    return []


@case("architecture 'OddForCausalLM' is not supported")
def unknown_architecture(site: Site) -> Words:
    site.edit_config(architectures=["OddForCausalLM"])
    return []


@case("needs Python code from its own repository")
def code_of_its_own(site: Site) -> Words:
    site.edit_config(auto_map={"AutoModel": "modeling.Model"})
    return []


@case(r"tokenizer\.json")
def broken_tokenizer(site: Site) -> Words:
    (site.model / "tokenizer.json").write_text("{}")
    return []


@case("no/such/template")
def missing_template(site: Site) -> Words:
    return ["--chat-template", "/no/such/template"]


@case(r"lora_modules: fr: /no/such has no adapter_config\.json")
def no_adapter(site: Site) -> Words:
    return ["--enable-lora", "--lora-modules", "fr=/no/such"]


@case("lora_modules: fr: its rank is 32; --max-lora-rank is 16")
def adapter_of_too_large_a_rank(site: Site) -> Words:
    return ["--enable-lora", "--lora-modules", f"fr={write_adapter(site.folder / 'fr', site.model, rank=32)}"]


@case("lora_modules: tiny: 'tiny' is the name of the model")
def adapter_of_the_models_name(site: Site) -> Words:
    return ["--enable-lora", "--lora-modules", "tiny=/no/such"]


@case("max_model_len: 4096 is more than the model's 2048")
def too_long(site: Site) -> Words:
    return ["--max-model-len", "4096"]


@case(r"tensor_parallel_size: 8 prefill ranks cannot share .*possible: 1, 2")
def ranks_that_do_not_divide(site: Site) -> Words:
    return ["--tensor-parallel-size", "8"]


@case(r"the draft model has another tokenizer: token '.+' is \d+ of \d+ in .*tiny and is none of 300 in .*draft")
def draft_of_another_tokenizer(site: Site) -> Words:
    return _drafting(site, Shape(vocab_size=300))


@case("8 KV heads of 16 of the draft model do not fit into pages of the model, which has 2 of 16")
def draft_of_larger_pages(site: Site) -> Words:
    return _drafting(site, Shape(num_kv_heads=8, num_qo_heads=8))


@case("has 256 positions, and the served one 2048 .* give --max-model-len 256")
def draft_of_fewer_positions(site: Site) -> Words:
    return _drafting(site, Shape(max_model_len=256))


@case(r"/no/such/model/config\.json is missing")
def no_draft(site: Site) -> Words:
    return ["--speculative-config", json.dumps({"method": "draft_model", "model": "/no/such/model"})]


@case("device: cuda was asked for")
def no_gpu(site: Site) -> Words:
    return ["--device", "cuda"]


@case(r"quantization = fp8: only GPUs of capability 9\.0 or more multiply by 8-bit floats; use int8 or int4")
def weights_in_8_bit_floats_on_a_cpu(site: Site) -> Words:
    return ["--quantization", "fp8", "--dtype", "bfloat16"]


@case("kv_cache_dtype: fp8 needs a GPU")
def eight_bits_on_a_cpu(site: Site) -> Words:
    return ["--kv-cache-dtype", "fp8"]


@case("attention_backend: flashinfer does not run on cpu")
def kernels_of_another_device(site: Site) -> Words:
    return ["--attention-backend", "flashinfer"]


@case("kv_cache_memory_bytes: .* holds 0 blocks .* at least 16 are needed")
def tiny_cache(site: Site) -> Words:
    return ["--kv-cache-memory-bytes", "1K"]


@case(r"down_proj: a rank's 96 inputs of 192 are no whole groups of 64; give a worker fewer ranks, by --tensor-")
def ranks_that_cut_groups(site: Site) -> Words:
    site.edit_config(intermediate_size=192)
    return ["--load-format", "dummy", "--quantization", "int4", "--tensor-parallel-size", "2"]


@case(r"tiny: model\.layers\.0\.\S+: weights in act-order cannot be shared by ranks")
def ranks_that_share_inputs_in_act_order(site: Site) -> Words:
    _put_in_act_order(site, site.model)
    return ["--tensor-parallel-size", "2"]


@case(r"draft: model\.layers\.0\.\S+: weights in act-order cannot be shared by ranks")
def ranks_that_share_a_drafts_inputs_in_act_order(site: Site) -> Words:
    words = _drafting(site, Shape())
    _put_in_act_order(site, site.folder / "draft")
    return [*words, "--tensor-parallel-size", "2"]


@case(r"memory: 100 ranks take about [\d.]+ of [\d.]+ GiB free; start fewer workers")
def more_workers_than_memory(site: Site) -> Words:
    site.patch.setattr(host, "free_memory_bytes", lambda: 8 << 30)  # it changes from one look to the next
    return ["--prefill", "50", "--decode", "50"]


@case(r"launcher: ray is not installed: .* -m pip install 'ray>=")
def no_ray(site: Site) -> Words:
    site.patch.setattr(extras.RAY.__class__, "is_installed", property(lambda library: library != extras.RAY))
    return ["--launcher", "ray"]


@case(r"transfer: /proc cannot be written to: .*; mount it for this user to write .*: UCX_TLS=\^posix")
def shared_memory_that_takes_no_files(site: Site) -> Words:
    site.patch.setattr(host, "_SHARED_MEMORY", Path("/proc"))
    site.patch.delenv("UCX_TLS", raising=False)
    return []


@case(r"transfer: ucxx-cu12 is not installed: .* -m pip install 'ucxx-cu12>=")
def no_ucxx(site: Site) -> Words:
    site.patch.setattr(extras.UCXX.__class__, "is_installed", property(lambda library: library != extras.UCXX))
    return ["--transfer", "ucx"]


@case(r"port: cannot listen on 127.0.0.1:\d+: Address already in use")
def taken_port(site: Site) -> Words:
    return ["--port", str(_taken(site))]


@case(r"admin_port: cannot listen on 127.0.0.1:\d+: Address already in use")
def taken_admin_port_of_the_second_router(site: Site) -> Words:
    return ["--routers", "2", "--admin-port", str(_taken(site) - 1)]


@case(r"admin_port: cannot listen on 127.0.0.1:\d+: Address already in use")
def admin_port_that_is_the_clients(site: Site) -> Words:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return ["--port", str(port), "--admin-port", str(port)]


@case("host: cannot listen on 192.0.2.1:0: Cannot assign requested address")
def address_of_another_machine(site: Site) -> Words:
    return ["--host", "192.0.2.1", "--api-key", "key"]


@case("host: cannot listen on no.invalid:0: ")
def name_that_nobody_knows(site: Site) -> Words:
    return ["--host", "no.invalid", "--api-key", "key"]


@case("host: 0.0.0.0 is reachable from other machines and no API key is set")
def open_to_all(site: Site) -> Words:
    return ["--host", "0.0.0.0"]


@case("admin_host: 0.0.0.0 is reachable from other machines and no admin key is set")
def admin_open_to_all(site: Site) -> Words:
    return ["--admin-host", "0.0.0.0", "--admin-port", "0"]


@case(r"allowed_origins: \* lets every web page ask")
def open_to_every_page(site: Site) -> Words:
    return ["--allowed-origins", "*"]


@case("max_connections: 1000000000 connections need 1000000256 open files")
def more_connections_than_files(site: Site) -> Words:
    return ["--max-connections", "1000000000"]


@case("secret_file: .* holds a secret of 5 bytes")
def short_secret(site: Site) -> Words:
    return ["--secret-file", site.file("secret", "short")]


@case(r"secret_file: every user may read or write .*mode 0644")
def secret_for_everybody(site: Site) -> Words:
    return ["--secret-file", site.file("secret", "s" * 32, 0o644)]


@case(r"api_key_file: .*keys:1: hash: String should match")
def broken_key_file(site: Site) -> Words:
    return ["--api-key-file", site.file("keys", "- {id: a, hash: sesame}")]


@case("pid_file: cannot write /no/such/folder/pid: there is no folder /no/such/folder$")
def pid_file_nowhere(site: Site) -> Words:
    return ["--pid-file", "/no/such/folder/pid"]


@case("pid_file: .* is of process .*, which serves")
def pid_file_of_a_running_server(site: Site) -> Words:
    folder = Path(environment()["XDG_RUNTIME_DIR"]) / "kvferry"
    folder.mkdir()
    server = site.stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(socket_of(folder, os.getpid())))
    server.listen()
    return ["--pid-file", site.file("pid", str(os.getpid()))]


@case("disk_cache_dir: .* cannot be made or written to: Not a directory; set another --disk-cache-dir")
def disk_cache_in_a_file(site: Site) -> Words:
    return ["--disk-cache-dir", site.file("file", "") + "/cache"]


@case("disk_cache_dir: others may look into .*chmod 700")
def disk_cache_that_others_may_read(site: Site) -> Words:
    folder = site.folder / "cache"
    folder.mkdir()
    folder.chmod(0o755)
    return ["--disk-cache-dir", str(folder)]


@case("disk_cache_bytes: 2,097,152 bytes are needed in .*cache, 1,048,576 are free; lower it")
def disk_cache_larger_than_the_disk(site: Site) -> Words:
    return _caching_on_a_full_disk(site)


@case("data_dir: .* cannot be made or written to")
def data_in_a_file(site: Site) -> Words:
    return ["--data-dir", site.file("file", "") + "/data"]


@case("data_dir: /proc/data cannot be made or written to: .*; set another --data-dir")
def data_where_nobody_may_write(site: Site) -> Words:
    """Root may, by what the file system says before it is tried."""
    return ["--data-dir", "/proc/data"]


@case("data_dir: .* cannot be made or written to")
def data_below_a_folder_that_may_not_be_looked_into(site: Site) -> Words:
    def exists(path: Path) -> bool:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return os.path.exists(path)

    site.patch.setattr(Path, "exists", exists)
    return ["--data-dir", str(site.folder / "secret")]


@case("there is no prefix cache to keep there")
def disk_cache_without_a_prefix_cache(site: Site) -> Words:
    return ["--disk-cache-dir", str(site.folder / "cache"), "--no-enable-prefix-caching"]


def _put_in_act_order(site: Site, model: Path) -> None:
    quantized, _ = write_pair(site.folder / "act-order", "gptq 4 act-order")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(quantized / name, model / name)


def _drafting(site: Site, shape: Shape) -> Words:
    draft = write_checkpoint(site.folder / "draft", shape=shape)
    return ["--speculative-config", json.dumps({"method": "draft_model", "model": str(draft)})]


def _caching_on_a_full_disk(site: Site) -> Words:
    """Two ranks that need 1 MiB each where as much is free in all."""
    usage = shutil.disk_usage(site.folder)._replace(free=1 << 20)
    site.patch.setattr(shutil, "disk_usage", lambda path: usage)
    return ["--disk-cache-dir", str(site.folder / "cache"), "--disk-cache-bytes", "1MiB"]


def _taken(site: Site) -> int:
    """A port that somebody listens at until the test ends."""
    sock = site.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def site(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("kvferry.launch.doctor._TRIAL", "")  # what it opens is not asked here

    async def started(launcher: object) -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr("kvferry.launch.local.LocalLauncher.run", started)
    monkeypatch.setattr("kvferry.launch.on_ray.RayLauncher.run", started)
    model = tmp_path / "tiny"
    shutil.copytree(checkpoint, model)
    with contextlib.ExitStack() as stack:
        yield Site(tmp_path, model, monkeypatch, stack)


def outcome(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.err + output.out


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_three_refuse_in_the_same_words(name: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CASES[name]
    words = spoil(site)
    words = words if words and words[0].startswith("/") else [str(site.model), *words]
    if "--port" not in words:
        words += ["--port", "0"]
    served, dry = outcome(capsys, "serve", *words), outcome(capsys, "serve", *words, "--dry-run")
    assert served == dry
    code, line = served
    assert code == 2
    assert re.fullmatch(rf"kvferry: .*{message}.*\n", line), line
    code, report = outcome(capsys, "doctor", *words)
    assert code == 1
    assert f"{line.removeprefix('kvferry: ').strip()}\n" in report, report
    assert len(re.findall("^fail ", report, re.MULTILINE)) == 1, report


@pytest.mark.parametrize(("folder", "transports"), [("/proc", "^posix"), ("/nowhere", None)])
def test_shared_memory_is_asked_for_only_where_it_is_used(folder: str, transports: str | None, site: Site) -> None:
    site.patch.setattr(host, "_SHARED_MEMORY", Path(folder))
    host.check_shared_memory({} if transports is None else {"UCX_TLS": transports})


def test_what_is_right_is_refused_by_none(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(site.model), "--port", "0", "--pid-file", str(site.folder / "pid")]
    assert outcome(capsys, "serve", *words, "--dry-run")[0] == 0
    code, report = outcome(capsys, "doctor", *words)
    assert code == 0, report
    with pytest.raises(AssertionError, match="it was started"):
        main(["serve", *words])


def test_room_that_caches_have_already_is_not_asked_for_again(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", str(site.model), "--port", "0", "--dry-run", *_caching_on_a_full_disk(site)]
    (site.folder / "cache").mkdir(mode=0o700)
    assert outcome(capsys, *words)[0] == 2
    (site.folder / "cache" / "a-0of1.0.kv").write_bytes(bytes(1 << 20))
    assert outcome(capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("is_installed", "has_devices", "remedy"),
    [(False, True, "pip install 'nixl"), (True, False, "mount /sys"), (True, True, "UCX_LOG_LEVEL=info")],
)
def test_nixl_that_opens_no_agent_is_told_with_what_helps(
    is_installed: bool, has_devices: bool, remedy: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.patch.setattr("kvferry.launch.doctor._TRIAL", "raise SystemExit('no agent')")
    library = nixl() if is_installed else nixl()._replace(modules=("nowhere",))
    site.patch.setattr("kvferry.launch.doctor.nixl", lambda: library)
    site.patch.setattr("kvferry.launch.doctor._NETWORK_DEVICES", site.folder / ("" if has_devices else "none"))
    words = [str(site.model), "--port", "0", "--pid-file", str(site.folder / "pid"), "--transfer"]
    code, report = outcome(capsys, "doctor", *words, "ucx")
    assert code == 0  # whoever does not use it can do without
    assert re.search(rf"^warn  nixl .*no agent -> .*{remedy}", report, re.MULTILINE), report
    assert outcome(capsys, "doctor", *words, "nixl")[0] == 1


def test_gpus_that_nobody_can_see_are_told(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    tool = site.folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    tool.chmod(0o755)
    site.patch.setenv("PATH", str(site.folder), prepend=os.pathsep)
    words = ["doctor", str(site.model), "--port", "0", "--pid-file", str(site.folder / "pid")]
    for devices, line in (
        ("0", f"warn  gpu +{tool} fails: no driver -> CUDA_VISIBLE"),
        ("", "ok    gpu +none: the CPU"),
    ):
        site.patch.setenv("CUDA_VISIBLE_DEVICES", devices)
        code, report = outcome(capsys, *words)
        assert code == 0 and re.search(f"^{line}", report, re.MULTILINE), report


def test_a_gpu_without_flashinfer_is_refused_before_weights_are_read(site: Site) -> None:
    from kvferry.launch.host import Gpu

    host = Host(8, 64 << 30, (Gpu("0", "H200", 140 << 30, 139 << 30),))
    site.patch.setattr("kvferry.launch.preflight.read_host", lambda env: host)
    site.patch.setattr(type(extras.FLASHINFER), "is_installed", property(lambda library: library != extras.FLASHINFER))
    model = write_checkpoint(site.folder / "wide", head_dim=64)  # which GPUs attend with
    checks = list(Preflight(ServeSettings(model=str(model), port=0), environment()).checks())
    [failed] = [check for check in checks if check.level is Level.FAIL]
    assert re.search(
        r"device: a GPU is used, and flashinfer-python is not installed: .* -m pip install 'flash", failed.found
    )


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_each_pools_own_kernels_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    monkeypatch.setattr("kvferry.launch.preflight.describe", lambda folder, isa, *, is_float32: "avx2")
    folder = write_config(tmp_path, "30b-a3b")
    exchanging = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "expert_exchange": "all_to_all"}
    settings = ServeSettings.model_validate({pool: exchanging, "dtype": "bfloat16"})
    check = check_kernels(plan(settings, folder, "moe"), ModelConfig.from_dir(folder))
    assert isinstance(check, Check) and check.level is Level.WARN
    assert check.found.endswith(f"no C++ for experts whose tokens are exchanged (of {pool} workers alone)")


def test_a_model_on_the_hub_is_not_fetched_to_be_looked_at(site: Site) -> None:
    checks = list(Preflight(ServeSettings(model="some/model", port=0), environment(), fetches=False).checks())
    assert checks[-1].found == "some/model: fetched from the hub when it is served"
    assert all(check.level is Level.OK for check in checks)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_that_the_decoder_loads(family: str, tied: bool, tmp_path: Path) -> None:
    import torch

    from kvferry.engine.nn.decoder import Decoder
    from kvferry.engine.ranks.communicator import Communicator

    model_dir = write_checkpoint(tmp_path / "m", family, tie_embeddings=tied, biases=family == "llama")  # type: ignore[arg-type]
    config = ModelConfig.from_dir(model_dir)
    check_checkpoint(model_dir, config)
    decoder = Decoder(config, Communicator(), dtype=torch.float32, device=torch.device("cpu"))
    assert {slot.name: slot.shape for slot in decoder.slots()} == tensor_shapes(config)
