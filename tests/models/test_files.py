from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models import files
from kvferry.models.files import resolve_model
from kvferry.models.stored.json_files import read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/model": {
        "config.json": b"{}",
        "model.safetensors": bytes(25 << 20),  # more than the hub's library writes at once
        "consolidated.safetensors": b"the same weights again",
        "chat_template.jinja": b"{{ messages }}",
        "pytorch_model.bin": b"a pickle",
        "modeling_model.py": b"raise SystemExit('code from the hub was run')",
        "original/params.json": b"{}",
        "16bit/config.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"dense",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "adapter/config.json": b"{}",
        "a/config.json": b"{}",
    },
    "org/code": {"config.json": b'{"auto_map": {"AutoModel": "modeling.Model"}}'},
    "org/partial": {
        "config.json": b"{}",
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
    },
}


class FakeHub(BaseHTTPRequestHandler):
    """The hub's answers to what a snapshot download asks."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
        name = "/".join(path.split("/")[:2])
        rest = path.split("/")[2:] or ["revision", "main"]
        if name == "org/gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name == "org/down":
            self._send(500, b"{}", {})
        elif (files := REPOSITORIES.get(name)) is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[0] in ("revision", "tree", "resolve") and rest[1] not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "resolve":
            content = files["/".join(rest[2:])]
            self._send(200, content, {"ETag": f'"{abs(hash(content)):x}"', "X-Repo-Commit": COMMIT})
        elif rest[0] == "tree":
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            self._send(200, json.dumps(tree).encode(), {})
        else:
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(info).encode(), {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


PROGRAM = """
import json, sys
from pathlib import Path
from kvferry.common.errors import ConfigError
from kvferry.models.files import resolve_model
for name, revision in json.loads(sys.argv[1]):
    seen = []
    try:
        model = resolve_model(name, revision, lambda what, fraction: seen.append([what, fraction]))
        print(json.dumps({"name": model.served_name, "seen": seen, "dir": str(model.dir),
                          "files": sorted(str(f.relative_to(model.dir)) for f in Path(model.dir).rglob("*"))}))
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
"""


def _resolve_apart(
    names: list[tuple[str, str | None]], cache: Path, program: str = PROGRAM, **environ: str
) -> list[dict[str, object]]:
    """Resolves in a process of its own: the hub's library reads its environment when it is imported."""
    answer = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names)],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cache(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which org/model was downloaded."""
    cache = tmp_path_factory.mktemp("hub")
    (model,) = _resolve_apart([("org/model", None)], cache, HF_ENDPOINT=hub)
    pooling = ["1_Pooling", "1_Pooling/config.json", "2_Dense", "2_Dense/config.json"]
    further = ["additional_chat_templates", "additional_chat_templates/tool_use.jinja"]
    assert model["files"] == [*pooling, *further, "chat_template.jinja", "config.json", "model.safetensors"]
    assert model["name"] == "org/model"
    seen: Any = model["seen"]
    fractions = [fraction for _, fraction in seen]
    assert {what for what, _ in seen} == {"downloading org/model"}
    assert fractions == sorted(fractions) and (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert [fraction for fraction in fractions if 0.1 < fraction < 0.9]  # on the way, and not at its end alone
    return cache


@pytest.mark.slow
def test_of_a_hub_model_only_data_is_fetched_and_it_is_found_again_without_a_network(cache: Path) -> None:
    model, other = _resolve_apart([("org/model", None), ("org/other", None)], cache, HF_HUB_OFFLINE="1")
    assert model["name"] == "org/model" and "config.json" in str(model["files"])
    assert "org/other is not in the hub's cache" in str(other["error"])
    assert "name a local directory" in str(other["error"])


@pytest.mark.slow
def test_without_a_hub_to_reach_a_cached_model_is_used_and_another_is_refused(cache: Path) -> None:
    nobody = "http://127.0.0.1:1"  # the port of tcpmux, where nothing listens
    model, other = _resolve_apart([("org/model", None), ("org/other", None)], cache, HF_ENDPOINT=nobody)
    assert model["name"] == "org/model"
    assert "the hub cannot be reached" in str(other["error"])


@pytest.mark.slow
def test_each_refusal_of_the_hub_is_one_line_that_says_what_to_do(hub: str, tmp_path: Path) -> None:
    names = [("org/absent", None), ("org/gated", None), ("org/model", "v9"), ("org/code", None), ("org/partial", None)]
    answers = _resolve_apart(names, tmp_path, HF_ENDPOINT=hub)
    expected = [
        "the hub has no such model or it is private (set HF_TOKEN)",
        "org/gated is gated: accept its terms",
        "the hub has org/model, but no revision v9",
        "needs Python code from its own repository (auto_map",
        "the cached copy of org/partial lacks model-1.safetensors",
    ]
    for answer, text in zip(answers, expected, strict=True):
        assert text in str(answer["error"])
        assert "\n" not in str(answer["error"])


@pytest.mark.slow
def test_a_model_is_found_where_it_was_downloaded_and_no_hub_is_asked(cache: Path, hub: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("import resolve_model", "import ResolvedModel, find_model").replace(
        "resolve_model(", 'ResolvedModel("nowhere", name) if find_model(name, revision) is None else find_model('
    )
    names = [("org/model", None), ("org/model", COMMIT), ("org/model", "v9"), ("org/other", None)]
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    model, pinned, other, absent = _resolve_apart(names, cache, program, **nobody)
    assert str(model["dir"]) == str(pinned["dir"]) and "model.safetensors" in str(model["files"])
    assert other["dir"] == absent["dir"] == "nowhere"
    _resolve_apart([("org/partial", None)], tmp_path, HF_ENDPOINT=hub)
    [partial] = _resolve_apart([("org/partial", None)], tmp_path, program, **nobody)
    assert partial["dir"] == "nowhere", "a start completes it"


@pytest.mark.slow
def test_a_config_is_fetched_without_the_weights(hub: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("import resolve_model", "import ResolvedModel, resolve_config").replace(
        "resolve_model(name, revision, lambda what, fraction: seen.append([what, fraction]))",
        "ResolvedModel(resolve_config(name, revision), name)",
    )
    found, absent = _resolve_apart([("org/model", None), ("org/absent", None)], tmp_path, program, HF_ENDPOINT=hub)
    assert found["files"] == ["config.json"]
    assert "the hub has no such model" in str(absent["error"])


def test_a_directory_is_served_under_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    assert resolve_model(f"{path}/").served_name == "my-model"
    assert resolve_model(str(path)).dir == path


def test_a_directory_without_a_config_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("model-Q8_0.gguf", r"to serve model-Q8_0\.gguf, name that file"),
        ("params.json", "take the model's files for transformers"),
        ("model_index.json", "hf download ORG/NAME FILE"),
    ],
)
def test_a_directory_without_a_config_may_be_of_another_form(tmp_path: Path, name: str, way_out: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"has no config\.json; .*{way_out}"):
        resolve_model(str(tmp_path))


def test_a_tokenizer_that_brings_code_may_need_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.Odd", null]}}')
    with pytest.raises(ConfigError, match=r"auto_map in tokenizer_config\.json.* take auto_map out of that file"):
        resolve_model(str(tmp_path))


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(ConfigError, match="kvferry never runs"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "DeepseekV3ForCausalLM"])
def test_code_of_a_built_in_architecture_is_not_needed(tmp_path: Path, architecture: str) -> None:
    code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": f"modeling.{architecture}"}
    config = {"architectures": [architecture], "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(tmp_path)).dir == tmp_path
    for other in (config | {"architectures": ["OddForCausalLM"]}, {"auto_map": code}, config | {"auto_map": [1]}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(ConfigError, match="kvferry never runs"):
            resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere/at-all", "nowhere", "a/b/c", "/nowhere", "../x/y", ""])
def test_a_name_that_is_neither_says_what_was_looked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="no such directory, and a hub id has the form org/name"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file; a model is a directory"):
        resolve_model(str(file))


def test_a_revision_goes_with_a_hub_id_only(tmp_path: Path) -> None:
    for name in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match="goes with a hub id"):
            resolve_model(name, revision="main")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 100_000])
def test_a_file_without_a_json_object_is_a_config_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(file)


def test_a_missing_file_reads_as_its_default_or_is_an_error(tmp_path: Path) -> None:
    assert read_json(tmp_path / "gone.json", default={"a": 1}) == {"a": 1}
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.json"):
        read_json(tmp_path / "gone.json")


def test_an_earlier_checkpoints_index_needs_no_files_beside_one_file_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_snapshot", lambda *_: tmp_path)
    for name, data in REPOSITORIES["org/partial"].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=r"lacks model-1\.safetensors"):
        resolve_model("org/partial")
    (tmp_path / "model.safetensors").touch()
    assert resolve_model("org/partial").dir == tmp_path


def test_an_adapter_in_place_of_a_model_is_told_how_it_is_served(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ConfigError) as caught:
        resolve_model(str(path))
    assert str(caught.value) == (
        f"{path} holds an adapter, not a model: serve the model that it was made for, 'org/base', with --enable-lora "
        f"--lora-modules NAME={path}"
    )
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the model that it was made for with --enable-lora --lora-modules NAME=/"):
        resolve_model(str(path))


def test_a_model_in_the_home_of_nobody_is_refused_as_any_other_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no model '~nobody-here/m': there is no such directory"):
        resolve_model("~nobody-here/m")
