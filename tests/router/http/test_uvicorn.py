"""The names of uvicorn that router/http overrides and reads, private ones included, are in the installed version."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from types import CodeType, FunctionType

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import Server, ServerState

from kvferry.router.http.http_server import _Uvicorn
from kvferry.router.http.intake import HeldFlow
from kvferry.router.http.leaving import Connection
from kvferry.router.http.protocol import DeadlineProtocol

from ...test_layers import ROOT

OVERRIDDEN = {
    (DeadlineProtocol, HttpToolsProtocol): (
        *("__init__", "connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing"),
        *("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete"),
        *("on_response_complete", "send_400_response", "timeout_keep_alive_handler", "_unsupported_upgrade_warning"),
    ),
    (Connection, HttpToolsProtocol): ("shutdown",),
    (HeldFlow, FlowControl): ("pause_reading", "resume_reading"),
    (_Uvicorn, Server): ("capture_signals", "startup"),
}
CALLED = {
    HttpToolsProtocol: ("_unset_keepalive_if_required", "on_url"),
    FlowControl: ("drain", "pause_reading", "resume_reading", "pause_writing", "resume_writing"),
    Server: ("serve",),
}
# Attributes, each with a function of uvicorn that sets it.
ATTRIBUTES = {
    HttpToolsProtocol.__init__: (
        "loop",
        "logger",
        "parser",
        "timeout_keep_alive",
        "transport",
        "flow",
        "client",
        "cycle",
    ),
    HttpToolsProtocol.on_message_begin: ("scope", "url", "headers"),
    HttpToolsProtocol.on_headers_complete: ("cycle",),
    RequestResponseCycle.__init__: (
        *("transport", "message_event", "keep_alive", "disconnected"),
        *("response_started", "response_complete", "more_body"),
    ),
    FlowControl.__init__: ("_transport", "read_paused", "write_paused"),
    Server.__init__: ("server_state", "started", "should_exit"),
    Server.startup: ("servers",),
    ServerState.__init__: ("connections",),
}


@pytest.mark.parametrize(
    ("ours", "theirs", "name"), [(*pair, name) for pair, names in OVERRIDDEN.items() for name in names]
)
def test_what_is_overridden_is_there_with_the_same_parameters(ours: type, theirs: type, name: str) -> None:
    assert name in vars(ours) and name in vars(theirs)
    assert _parameters(vars(ours)[name]) == _parameters(vars(theirs)[name])


@pytest.mark.parametrize(("theirs", "name"), [(theirs, name) for theirs, names in CALLED.items() for name in names])
def test_what_is_called_is_there(theirs: type, name: str) -> None:
    assert callable(getattr(theirs, name))


@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function, names in ATTRIBUTES.items() for name in names]
)
def test_what_is_read_or_set_is_an_attribute(function: Callable[..., object], name: str) -> None:
    assert name in _code(function).co_names, f"{function.__qualname__} does not set {name}"


def test_overridden_methods_are_all_named_here() -> None:
    for (ours, theirs), names in OVERRIDDEN.items():
        functions = {name for name, value in vars(ours).items() if isinstance(value, FunctionType)}
        assert functions & vars(theirs).keys() == set(names)


def test_the_bound_is_the_minor_version_after_the_one_that_is_tested() -> None:
    major, minor = (int(part) for part in uvicorn.__version__.split(".")[:2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bounds,) = [one for one in project["dependencies"] if one.startswith("uvicorn")]
    below = bounds.rpartition("<")[2]
    assert [int(part) for part in below.split(".")] > [major, minor]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = [line for line in constraints if line.startswith("uvicorn==")]
    tested_major, tested_minor = pinned.removeprefix("uvicorn==").split(".")[:2]
    assert below == f"{tested_major}.{int(tested_minor) + 1}"


def _parameters(function: Callable[..., object]) -> list[str]:
    return [name.lstrip("_") for name in inspect.signature(function).parameters]


def _code(function: Callable[..., object]) -> CodeType:
    assert isinstance(function, FunctionType)
    return function.__code__
