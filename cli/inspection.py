"""Commands that look and change nothing: `doctor`, `config`, `explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from ..common.config import ADMIN_KEY_VARIABLE, environment
from ..settings.fields import setting_keys
from ..settings.flags import with_settings
from ..settings.http import KEY_SETTINGS
from ..settings.load import Loaded, load, value_of

_WIDE = 140  # columns of a table of requests

config_app = typer.Typer(help="Show or check settings without starting anything.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    command = app.command(rich_help_panel="Look")
    command(doctor)
    command(explain)
    config_app.command("show")(config_show)
    config_app.command("check")(config_check)
    app.add_typer(config_app, name="config", rich_help_panel="Look")


@with_settings("serve", environment)
def doctor(loaded: Loaded) -> None:
    """Check whether `kvferry serve` will work with the same options, and say how to mend what will not."""
    from rich.console import Console

    from ..launch.doctor import examine
    from ..launch.preflight import Level

    console = Console(highlight=False, soft_wrap=True)
    colors = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
    failed = False
    for check in examine(loaded.settings, environment()):
        failed |= check.level is Level.FAIL
        console.print(f"[{colors[check.level]}]{check.level:5}[/]", f"{check.name:14}", end="")
        console.print(f"{check.found}{' -> ' + check.fix if check.fix else ''}", markup=False)
    raise typer.Exit(1 if failed else 0)


def explain(
    admin: Annotated[str | None, typer.Option(help="A router's admin listener.", metavar="URL")] = None,
    request_id: Annotated[
        str | None, typer.Argument(metavar="REQUEST_ID", help="x-request-id or an answer's id. Without one: a list.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar=ADMIN_KEY_VARIABLE, help="Its key.", metavar="KEY", show_envvar=True)
    ] = None,
    kind: Annotated[str, typer.Option(help="Of a list: recent, slowest or failed.", metavar="TEXT")] = "recent",
) -> None:
    """Show why a request went where it went, what was expected of it and which phase spent its time.

    Without --admin: of the deployment of this user that runs on this machine, of all of its routers.
    """
    from rich.console import Console

    from ..router.admin.explain_view import fetch, fetch_first, list_path, path_of, show, show_list
    from .operate import running_admins

    admins = [admin] if admin is not None else running_admins()
    console, key = Console(highlight=False), (admin_key or "").partition(",")[0]
    console.width = max(console.width, _WIDE)  # ids are for copying: a narrow terminal wraps lines, but cuts none
    if request_id is not None:
        show(console, fetch_first(admins, path_of(request_id), key))
        return
    for address in admins:
        if len(admins) > 1:
            console.print(address)
        show_list(console, fetch(address, list_path(kind), key)["requests"])


@with_settings("serve", environment)
def config_show(
    loaded: Loaded,
    origins: Annotated[bool, typer.Option("--origins", help="Say where each value comes from.", metavar="")] = False,
) -> None:
    """Print every setting as YAML, as `serve` with the same options would see it.

    A default that gives way to another setting is behind a #.
    """
    section, remarks = "", loaded.settings.giving_way
    for key in setting_keys().values():
        value = value_of(loaded.settings, key)
        head, _, own = key.rpartition(".")
        if head != section and head:
            print(f"{head}:")
        section = head
        shown = ["***"] * len(value) if key in KEY_SETTINGS and isinstance(value, tuple) else value
        comment = f"  # {loaded.origins[key]}" if origins else ""
        indent = "  " if head else "# " if key in remarks else ""
        print(f"{indent}{own}: {json.dumps(shown, default=_plain)}{comment}")  # JSON is YAML


def _plain(value: object) -> object:
    """A setting's value as JSON has it."""
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else str(value)


def config_check(file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML settings.")]) -> None:
    """Check a YAML file; exit code 2 with a line for each mistake."""
    load(flags={}, env={}, file=file)
    print(f"{file}: ok")
