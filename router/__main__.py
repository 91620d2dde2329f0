"""`python -m kvferry.router --config-json JSON [--lifeline-fd N]`: the router process, as a launcher starts it.

Secrets come by environment, not by arguments that every user of the machine can read: KVFERRY_SECRET, and
KVFERRY_API_KEY (comma separated).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence

import uvloop
from pydantic import ValidationError

from ..common.config import RouterConfig, environment, shared_secret
from ..common.errors import ConfigError
from ..common.lifeline import Lifeline
from ..common.logs import configure_logging
from .server import serve_router

API_KEY_VARIABLE = "KVFERRY_API_KEY"
_CONFIG_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.router", description="kvferry's router process")
    parser.add_argument("--config-json", required=True, help="a RouterConfig as JSON")
    parser.add_argument("--lifeline-fd", type=int, help="the launcher's socket")
    options = parser.parse_args(argv)
    lifeline = Lifeline.from_fd(options.lifeline_fd) if options.lifeline_fd is not None else None
    env = environment()
    try:
        config = parse_config(options.config_json, env)
        configure_logging(config.log_level, process="router")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve_router(config, shared_secret(None, env), lifeline))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        if lifeline is not None:
            lifeline.failed(str(error))
        return _CONFIG_EXIT_CODE


def parse_config(text: str, env: Mapping[str, str]) -> RouterConfig:
    """The configuration with the environment's API keys added to its own."""
    try:
        config = RouterConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"--config-json: {error.errors(include_url=False, include_input=False)}") from None
    keys = tuple(key.strip() for key in env.get(API_KEY_VARIABLE, "").split(",") if key.strip())
    return config.model_copy(update={"api_keys": (*config.api_keys, *keys)})


if __name__ == "__main__":
    sys.exit(main())
