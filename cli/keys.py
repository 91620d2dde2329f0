"""`kvferry keys`: makes and edits files of API keys, which hold hashes only."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError
from .paths import at_home

File = Annotated[Path, typer.Option(help="The key file.", metavar="FILE", callback=at_home)]
Id = Annotated[str, typer.Argument(metavar="ID", help="Whose key: the tenant's name.")]

keys_app = typer.Typer(
    help="Make and edit a file of API keys (--api-key-file, --admin-key-file).", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    keys_app.command("add")(add)
    keys_app.command("revoke")(revoke)
    keys_app.command("list")(list_keys)
    app.add_typer(keys_app, name="keys", rich_help_panel="Operate")


def add(
    key_id: Id,
    file: File,
    expires: Annotated[
        str | None, typer.Option(help="Until when it is good: 2027-01-31, or with a time.", metavar="WHEN")
    ] = None,
) -> None:
    """Draw a key, put its hash into the file and print it: it is kept nowhere. Then: kvferry reload."""
    from ..common.clock import wall_time_s
    from ..settings.key_file import add_key

    until = _moment(expires) if expires is not None else None
    if until is not None and until.timestamp() <= wall_time_s():
        raise ConfigError(f"--expires: {until.isoformat()} is over: the key would never be good")
    print(add_key(file, key_id, until))


def revoke(key_id: Id, file: File) -> None:
    """Take every key of this id out of the file. Then: kvferry reload."""
    from ..settings.key_file import revoke_keys

    count = revoke_keys(file, key_id)
    if not count:
        raise ConfigError(f"id: {file} has no key of {key_id}")
    print(f"{count} of {key_id} revoked")


def list_keys(file: File) -> None:
    """Show whose keys are in the file, the beginning of each hash, and until when they are good."""
    from ..common.clock import wall_time_s
    from ..settings.key_file import read_key_file

    now_s = wall_time_s()
    for entry in read_key_file(file, "file"):
        until = entry.expires
        over = " (expired)" if entry.expires_s is not None and entry.expires_s <= now_s else ""
        print(f"{entry.id}  {entry.hash[:20]}  {until.isoformat() if until is not None else 'no end'}{over}")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires: {text!r} is no date such as 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
