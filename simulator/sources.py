"""Traces by name: downloaded once from where they were published, and checked."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from ..common.errors import ConfigError
from ..models.default import cache_dir

SAMPLES = Path(__file__).resolve().parent / "traces"  # the beginnings of these traces

Download = Callable[[str], bytes]


@dataclass(slots=True, frozen=True)
class Source:
    url: str
    sha256: str
    licence: str
    sample: str  # file in `SAMPLES`


_MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces"
_AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data"
SOURCES = {
    "mooncake-conversation": Source(
        f"{_MOONCAKE}/conversation_trace.jsonl",
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        "Apache-2.0",
        "mooncake-conversation.jsonl",
    ),
    "azure-2023-conv": Source(
        f"{_AZURE}/AzureLLMInferenceTrace_conv.csv",
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        "CC-BY-4.0",
        "azure-2023-conv.csv",
    ),
    "azure-2023-code": Source(
        f"{_AZURE}/AzureLLMInferenceTrace_code.csv",
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        "CC-BY-4.0",
        "azure-2023-code.csv",
    ),
}


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60.0) as answer:
            content: bytes = answer.read()
    except (OSError, HTTPException) as error:
        raise ConfigError(f"trace: cannot download {url}: {error}; give a path instead") from error
    return content


def trace_path(trace: str) -> Path:
    """The file of a trace that is named, of a sample ("sample:NAME"), or of a path."""
    if trace.startswith("sample:"):
        return SAMPLES / _source(trace.removeprefix("sample:")).sample
    if trace not in SOURCES:
        path = os.path.expanduser(trace)
        if not os.path.exists(path):  # pathlib's own raises where a name is too long
            raise ConfigError(f"trace {trace}: neither a file nor one of {', '.join(SOURCES)}")
        return Path(path)
    return fetch(trace, cache_dir() / "traces")


def _source(name: str) -> Source:
    try:
        return SOURCES[name]
    except KeyError:
        raise ConfigError(f"trace {name}: known are {', '.join(SOURCES)}") from None


def fetch(
    name: str, cache_dir: Path, sources: Mapping[str, Source] = SOURCES, *, download: Download = _download
) -> Path:
    """Download it unless it is there. What is not the published file, byte for byte, is refused."""
    source = sources[name]
    path = cache_dir / f"{name}{Path(source.sample).suffix}"
    try:
        if path.exists() and _digest(path.read_bytes()) == source.sha256:
            return path
    except OSError as error:
        raise ConfigError(f"trace {name}: {path} cannot be read: {error.strerror}") from error
    content = download(source.url)
    if (digest := _digest(content)) != source.sha256:
        raise ConfigError(f"trace {name}: {source.url} has SHA-256 {digest}, expected {source.sha256}")
    partial = path.with_suffix(".part")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"trace {name}: cannot be kept at {path}: {error.strerror}") from error
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
