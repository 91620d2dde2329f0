"""The router process: `python -m kvferry.router --config-json JSON`, as a launcher starts it.

`--lifeline-fd N` is the launcher's socket; `--http-fd N` and `--admin-fd N` listen already, shared with other routers.
Secrets come in files or by environment, not by arguments that every user of the machine can read: KVFERRY_SECRET, and
KVFERRY_API_KEY and KVFERRY_ADMIN_KEY (comma separated).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

import uvloop
from pydantic import ValidationError

from ..common.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, environment, keys_of
from ..common.errors import ConfigError
from ..common.logs import configure_logging
from ..common.router_config import RouterConfig
from ..wire.lifeline import Lifeline
from .access.credentials import RouterCredentials
from .garbage import collect_rarely
from .server import serve_router

_CONFIG_EXIT_CODE = 2
# Threads that encode large answers hold the event loop for no longer (Python's default: 5 ms each), but where one call
# into C takes longer: what they encode at once is small.
_SWITCH_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.router", description="kvferry's router process")
    parser.add_argument("--config-json", required=True, help="a RouterConfig as JSON")
    parser.add_argument("--lifeline-fd", type=int, help="the launcher's socket")
    parser.add_argument("--stderr-fd", type=int, help="standard error, once the launcher says so")
    parser.add_argument("--http-fd", type=int, help="a socket that listens for clients")
    parser.add_argument("--admin-fd", type=int, help="a socket that listens for operators")
    options = parser.parse_args(argv)
    lifeline = Lifeline.from_fds(options.lifeline_fd, options.stderr_fd)
    env = environment()
    sys.setswitchinterval(_SWITCH_S)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a reload before there is anything to read again
    try:
        config = parse_config(options.config_json, env)
        configure_logging(config.log_level, log_format=config.log_format, process="router")
        http, admin = _inherited(options.http_fd), _inherited(options.admin_fd)
        credentials = RouterCredentials.from_config(config, env)
        serving = serve_router(
            config, credentials, lifeline, http_socket=http, admin_socket=admin, on_ready=collect_rarely
        )
        # Not closed: that would wait for a thread whose file does not open. The process ends next (`exit_process`).
        return asyncio.Runner(loop_factory=uvloop.new_event_loop).run(serving)
    except ConfigError as error:
        if lifeline is not None:
            lifeline.failed(str(error))  # who started us tells it
        else:
            print(f"kvferry: {error}", file=sys.stderr)
        return _CONFIG_EXIT_CODE
    except Exception as error:  # as where no thread can be made: the log has where it comes from
        if lifeline is not None:
            lifeline.broke(f"{type(error).__name__}: {error}")
        raise


def parse_config(text: str, env: Mapping[str, str]) -> RouterConfig:
    """The configuration with the environment's keys added to its own."""
    try:
        config = RouterConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"--config-json: {error.errors(include_url=False, include_input=False)}") from None
    api_keys, admin_keys = keys_of(env, API_KEY_VARIABLE), keys_of(env, ADMIN_KEY_VARIABLE)
    return config.model_copy(
        update={"api_key": (*config.api_key, *api_keys), "admin_key": (*config.admin_key, *admin_keys)}
    )


def _inherited(fd: int | None) -> socket.socket | None:
    if fd is None:
        return None
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)
