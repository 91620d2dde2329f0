"""Files that are named on a command line."""

from __future__ import annotations

from pathlib import Path

import typer

from ..common.errors import ConfigError
from ..settings.values import expanded


def at_home(param: typer.CallbackParam, file: Path | None) -> Path | None:
    """Put the home of who asks in the place of `~`: a shell leaves that of `--file=~/keys.yaml` as it is."""
    if file is None:
        return None
    try:
        return Path(expanded(str(file)))
    except ValueError as error:
        raise ConfigError(f"{param.opts[0]}: {error}, not {str(file)!r}") from None
