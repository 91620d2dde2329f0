"""Resolves what the user named to a local model directory.

A model is named in one of four ways: not at all (the embedded default), by a directory or a GGUF file, or by a hub id
`org/name`, whose snapshot is downloaded once and then found in the hub's cache, without a network too. Only data is
ever fetched or read: a model whose config asks for code of its own is refused.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..common.config import QuantizationName
from ..common.errors import ConfigError
from .default import DEFAULT_MODEL_NAME, Progress, default_model_dir, gguf_model_dir
from .families.lookup import needs_code
from .gguf.files import gguf_name
from .quantization_config import MODELOPT_FILE
from .stored.json_files import read_json
from .stored.pointer import LFS_POINTER, refuse_pointer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")  # data only: no pickles, no code
# Subfolders, and second copies of the weights. Folders that begin with a number and "_" or with "add" are those of an
# embedding model's modules (1_Pooling), of which the configs are wanted, and of further chat templates
# (additional_chat_templates).
_UNWANTED = (
    *("[!1-9a]*/*", "[1-9]/*", "[1-9][!_]*/*", "[1-9]_*/*.safetensors"),
    *("a/*", "a[!d]*/*", "ad/*", "ad[!d]*/*", "consolidated*.safetensors"),
)
_MAY_ASK_FOR_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine."""

    dir: Path
    served_name: str  # what clients call it


def is_on_hub(name: str | None) -> bool:
    """Tell whether this names a model of the hub: it may be here already, or still has to be downloaded."""
    return name is not None and not _path_of(name).exists() and _HUB_ID.fullmatch(name) is not None


def resolve_model(
    name: str | None,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    quantization: QuantizationName | None = None,
) -> ResolvedModel:
    """Find the model, fetching or converting it when it is not here yet. Raises ConfigError.

    `quantization` gguf: the built-in model's matrices as its file has them.
    """
    if name is not None and is_on_hub(name):
        return _checked(ResolvedModel(_download(name, revision, progress), name))
    if revision is not None:
        raise ConfigError(f"a revision ({revision}) goes with a hub id such as org/name only")
    if name is None:
        return ResolvedModel(default_model_dir(progress, keeps_blocks=quantization == "gguf"), DEFAULT_MODEL_NAME)
    path = _path_of(name)
    if path.suffix == ".gguf" and path.is_file():
        refuse_pointer(path, _beginning(path))
        return ResolvedModel(gguf_model_dir(path, progress), gguf_name(path))
    return _checked(_local(name))


def find_model(
    name: str | None,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    quantization: QuantizationName | None = None,
) -> ResolvedModel | None:
    """Do as `resolve_model`, but ask no hub; None: a model of the hub is not here, or not as a whole."""
    if name is None or not is_on_hub(name):
        return resolve_model(name, revision, progress, quantization=quantization)
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        return None
    except errors.HFValidationError as error:
        raise ConfigError(f"{name!r} is no hub id: {_first_line(error)}") from error
    path = Path(found)
    has_weights = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    is_whole = has_weights and (path / "config.json").is_file() and not _missing_shards(name, path)
    return _checked(ResolvedModel(path, name)) if is_whole else None


def resolve_config(name: str | None, revision: str | None = None) -> Path:
    """Find the folder of a model's config.json, fetching that and nothing else. Raises ConfigError."""
    if name is None or not is_on_hub(name):
        return resolve_model(name, revision).dir
    wanted = (*_MAY_ASK_FOR_CODE, "generation_config.json", MODELOPT_FILE)
    return _checked(ResolvedModel(_snapshot(name, revision, None, wanted=wanted), name)).dir


def _path_of(name: str) -> Path:
    return Path(os.path.expanduser(name))  # pathlib's own raises where there is no such user


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _local(name: str) -> ResolvedModel:
    path = _path_of(name)
    if name and path.is_dir():  # an empty name is not the current directory
        return ResolvedModel(path, path.resolve().name)
    if name and path.exists():
        raise ConfigError(
            f"{name} is a file; a model is a directory with config.json and *.safetensors, or a .gguf file"
        )
    raise ConfigError(
        f"no model {name!r}: there is no such directory, and a hub id has the form org/name; "
        f"without a name the default {DEFAULT_MODEL_NAME} is served"
    )


def _checked(model: ResolvedModel) -> ResolvedModel:
    if not (model.dir / "config.json").is_file():
        _refuse_without_config(model.dir)
    check_no_code(model.dir)
    return model


def _refuse_without_config(path: Path) -> NoReturn:
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ConfigError(
            f"{path} holds an adapter, not a model: serve the model that it was made for"
            f"{f', {base!r},' if base else ''} with --enable-lora --lora-modules NAME={path}"
        )
    way_out = "those of the hub are downloaded first: hf download ORG/NAME FILE"
    if files := sorted(path.glob("*.gguf")):
        way_out = f"to serve {files[0].name}, name that file"
    elif (path / "params.json").is_file():
        way_out = "params.json is of Mistral's or Meta's own form: take the model's files for transformers"
    what = "a model is a directory with config.json and *.safetensors, or a .gguf file"
    raise ConfigError(f"{path} has no config.json; {what}; {way_out}")


def check_no_code(path: Path) -> None:
    """Refuse a model that needs Python code from its own repository: without it, answers would be wrong."""
    for name in _MAY_ASK_FOR_CODE:
        asked = read_json(path / name, default={})
        if needs_code(asked) if name == "config.json" else "auto_map" in asked:
            way_out = "take auto_map out of that file if its tokenizer.json is right without the code"
            way_out = "use a model of a built-in architecture" if name == "config.json" else way_out
            what = f"{path} needs Python code from its own repository (auto_map in {name})"
            raise ConfigError(f"{what}, which kvferry never runs; {way_out}")


def _download(name: str, revision: str | None, progress: Progress | None) -> Path:
    what = f"downloading {name}"
    if progress:
        progress(what, 0.0)
    path = _snapshot(name, revision, progress)
    if missing := _missing_shards(name, path):
        raise ConfigError(f"the cached copy of {name} lacks {missing[0]}; start once with a network to complete it")
    if progress:
        progress(what, 1.0)
    return path


def _missing_shards(name: str, path: Path) -> list[str]:
    """List the files of weights that a snapshot's index names and that are not in it. Raises ConfigError."""
    if (path / "model.safetensors").is_file():  # an index beside it is an earlier checkpoint's
        return []
    shards = read_json(path / "model.safetensors.index.json", default={}).get("weight_map", {})
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    if outside := sorted(shard for shard in names if Path(shard).name != shard):
        raise ConfigError(f"the index of {name} names {outside[0]!r}, which is no file beside it")
    return sorted(shard for shard in names if not (path / shard).is_file())


def _snapshot(name: str, revision: str | None, progress: Progress | None, *, wanted: tuple[str, ...] = _WANTED) -> Path:
    """Return the hub's snapshot of the model; each way to fail as one line that says what to do."""
    from huggingface_hub import errors, snapshot_download

    what = f"downloading {name}"
    bars = _bars(_size_on_hub(name, revision), partial(progress, what)) if progress is not None else None
    at = f"{name} at revision {revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(_UNWANTED),
                tqdm_class=bars,
            )
        )
    except errors.GatedRepoError as error:
        raise ConfigError(f"{at} is gated: accept its terms on its hub page, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"no model {at}: there is no such directory, and the hub has no such model or it is private (set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"the hub has {name}, but no revision {revision} of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{at} is not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set): "
            "connect once, or name a local directory"
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{name!r} is no hub id: {_first_line(error)}") from error
    except Exception as error:  # HTTP libraries differ between hub versions, and so do their errors
        raise ConfigError(f"{at} could not be downloaded: {type(error).__name__}: {_first_line(error)}") from error


def _size_on_hub(name: str, revision: str | None) -> int:
    """Return the bytes of the wanted files; 0 where the hub does not tell: whoever downloads them will say why."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    except Exception:  # HTTP libraries differ between hub versions, and so do their errors
        return 0
    return sum(file.size or 0 for file in files if _is_wanted(file.rfilename))


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, known) for known in _WANTED) and not any(fnmatch(name, known) for known in _UNWANTED)


def _bars(num_bytes: int, tell: Callable[[float], None]) -> type:
    """Make a class for the hub's progress bars that shows none, and tells which share of all bytes is here."""
    from huggingface_hub.utils.tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self._counts_bytes = options.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and num_bytes:
                tell(min(1.0, self.n / num_bytes))

    return Told


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file by one rename, its folder too where it is missing. Raises OSError, and leaves nothing then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        file.write(data)
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
