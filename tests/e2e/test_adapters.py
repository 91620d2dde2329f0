"""Adapters on a whole cluster: every answer is its merged model's, whoever else is served, loaded or unloaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..adapters import merge, write_adapter
from ..checkpoints import write_checkpoint, write_tokenizer
from ..engine_driver import Driver, make_engine, prompts
from ..transformers_checkpoints import SMALL, write_model
from .cluster import Cluster, serve

NUM_TOKENS = 8
LENGTHS = [40, 3, 70, 17]
FLAGS = ("--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--num-threads", "1")
LORA = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "32")
RUNTIME = ("--allow-runtime-lora-updating", "--admin-port", "0")
RANKS = {"one": 8, "two": 32, "three": 13, "other": 16}


class Models:
    """A model, adapters of it, and the tokens that each of them yields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dir = write_checkpoint(folder / "tiny", "qwen3", num_layers=3)
        self.adapters = {
            name: write_adapter(folder / name, self.dir, rank=rank, seed=index, rslora=index == 1)
            for index, (name, rank) in enumerate(RANKS.items())
        }
        self.prompts = prompts(LENGTHS)
        self.wanted = {name: self._tokens(merge(self.dir, self.adapters[name], folder / f"m-{name}")) for name in RANKS}
        self.wanted["tiny"] = self._tokens(self.dir)

    def _tokens(self, model_dir: Path) -> list[list[int]]:
        driver = Driver(make_engine(model_dir, max_model_len=256))
        return [driver.generate([driver.add(prompt)])[0] for prompt in self.prompts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def cluster(models: Models) -> Iterator[Cluster]:
    modules = [
        flag for name in ("one", "two", "three") for flag in ("--lora-modules", f"{name}={models.adapters[name]}")
    ]
    with serve(models.dir, models.folder / "log", *FLAGS, *LORA, *RUNTIME, *modules) as cluster:
        yield cluster


def ask(cluster: Cluster, model: str, prompt: list[int]) -> list[int]:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer: Any = cluster.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert answer["model"] == model
    return list(answer["choices"][0]["token_ids"])


def load(cluster: Cluster, name: str, path: Path, **fields: object) -> Any:
    return cluster.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def test_mixed_answers_are_the_merged_models(cluster: Cluster, models: Models) -> None:
    """Three adapters and the model itself share two slots, over handoffs; equal prompts share no prefix."""
    before = cluster.metric("kvferry_kv_transfer_bytes_count")
    names = ["one", "two", "three", "tiny"]
    calls = [(name, index) for _ in range(2) for index in range(len(LENGTHS)) for name in names]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda call: ask(cluster, call[0], models.prompts[call[1]]), calls))
    assert found == [models.wanted[name][index] for name, index in calls]
    assert models.wanted["one"] != models.wanted["two"] != models.wanted["tiny"]
    assert cluster.metric("kvferry_kv_transfer_bytes_count") > before, "KV was handed over"


def test_names_are_listed_and_others_refused(cluster: Cluster, models: Models) -> None:
    listed: Any = cluster.client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in listed[:2]] == [("tiny", None), ("one", "tiny")]
    assert listed[1]["root"] == str(models.adapters["one"])
    answer = cluster.client.post("/v1/completions", json={"model": "four", "prompt": "x"})
    assert answer.status_code == 404 and "'four'" in answer.json()["error"]["message"]


def test_loading_and_unloading_in_vllms_words(cluster: Cluster, models: Models) -> None:
    answer = load(cluster, "late", models.adapters["other"])
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    assert ask(cluster, "late", models.prompts[0]) == models.wanted["other"][0]
    again = load(cluster, "late", models.adapters["one"])
    assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
    missing = load(cluster, "none", models.folder / "nowhere")
    assert missing.status_code == 400 and "has no adapter_config.json" in missing.json()["error"]["message"]
    large = load(cluster, "large", write_adapter(models.folder / "large", models.dir, rank=64))
    assert large.status_code == 400 and "--max-lora-rank is 32" in large.json()["error"]["message"]
    assert load(cluster, "tiny", models.adapters["one"], load_inplace=True).status_code == 400
    gone = cluster.client.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
    assert cluster.client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 404
    assert cluster.client.post("/v1/completions", json={"model": "late", "prompt": "x"}).status_code == 404
    [admin] = cluster.admin_urls
    body = {"lora_name": "late", "lora_path": str(models.adapters["two"])}
    assert cluster.client.post(f"{admin}/v1/load_lora_adapter", json=body).status_code == 200
    assert ask(cluster, "late", models.prompts[0]) == models.wanted["two"][0]


def test_a_name_that_is_loaded_anew_mixes_no_versions(cluster: Cluster, models: Models) -> None:
    """Under load each answer is wholly of one version, and those asked for after the change are of the new one."""
    assert load(cluster, "moving", models.adapters["one"]).status_code == 200
    stop = threading.Event()
    found: list[list[int]] = []

    def keep_asking() -> None:
        while not stop.is_set():
            found.append(ask(cluster, "moving", models.prompts[0]))

    versions = [models.wanted[name][0] for name in ("one", "two")]
    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(keep_asking) for _ in range(3)]
        for turn in range(4):
            name = ("two", "one")[turn % 2]
            assert load(cluster, "moving", models.adapters[name], load_inplace=True).status_code == 200
            assert ask(cluster, "moving", models.prompts[0]) == models.wanted[name][0]
        stop.set()
        for future in asking:
            future.result()
    assert found and all(tokens in versions for tokens in found)


def test_changed_bytes_are_refused_and_named(cluster: Cluster, models: Models) -> None:
    path = write_adapter(models.folder / "changing", models.dir, rank=8, seed=9)
    assert load(cluster, "changing", path).status_code == 200
    write_adapter(path, models.dir, rank=8, seed=10)
    answer = cluster.client.post("/v1/completions", json={"model": "changing", "prompt": models.prompts[0]})
    assert answer.status_code == 500 and "has changed" in answer.json()["error"]["message"]
    assert ask(cluster, "one", models.prompts[0]) == models.wanted["one"][0]


def test_ranks_share_adapters(models: Models) -> None:
    flags = ("--tensor-parallel-size", "2", "--prefill", "0", "--lora-modules", f"two={models.adapters['two']}")
    with serve(models.dir, models.folder / "log-tp", *FLAGS, *LORA, *flags) as cluster:
        assert [ask(cluster, "two", prompt) for prompt in models.prompts] == models.wanted["two"]
        assert [ask(cluster, "tiny", prompt) for prompt in models.prompts] == models.wanted["tiny"]


def test_experts_are_adapted_over_handoffs(tmp_path: Path) -> None:
    import transformers

    fields = SMALL | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    model_dir = write_model(tmp_path / "moe", transformers.Qwen3MoeConfig(**fields))
    write_tokenizer(model_dir, 512)
    parts = ("gate_proj", "up_proj", "down_proj")
    paths = {
        "all": write_adapter(tmp_path / "all", model_dir, rank=16, targets=parts, rslora=True),
        "some": write_adapter(tmp_path / "some", model_dir, rank=4, targets=parts, only=r"experts\.[1-4]\.", seed=1),
    }
    dirs = {name: merge(model_dir, path, tmp_path / f"m-{name}") for name, path in paths.items()} | {"tiny": model_dir}
    wanted = {}
    for name, path in dirs.items():
        driver = Driver(make_engine(path, max_model_len=256))
        wanted[name] = [driver.generate([driver.add(prompt)])[0] for prompt in prompts(LENGTHS)]
    modules = [flag for name, path in paths.items() for flag in ("--lora-modules", f"{name}={path}")]
    calls = [(name, index) for index in range(len(LENGTHS)) for name in dirs]
    with serve(model_dir, tmp_path / "log", *FLAGS, *LORA, *modules) as cluster, ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda call: ask(cluster, call[0], prompts(LENGTHS)[call[1]]), calls))
    assert found == [wanted[name][index] for name, index in calls]
    assert wanted["all"] != wanted["some"] != wanted["tiny"]
