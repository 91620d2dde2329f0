"""Commands for a deployment that runs on this machine: `status`, `reload`, `restart`, `drain`.

They find it by its socket in this user's runtime folder (launch/running.py). With several deployments, `--port` or
`--pid-file` says which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.config import environment
from ..common.errors import ConfigError, KVFerryError
from ..launch.running import NobodyListens, ask, read_pid, running_pids, runtime_dir, socket_of, wait_for_end
from .console import make_console
from .paths import at_home

_STATUS_LIMIT_S = 5.0
_NOT_RUNNING_EXIT_CODE = 3  # as init scripts say it

Port = Annotated[int | None, typer.Option(help="Which deployment: the one that serves this port.", metavar="N")]
PidFile = Annotated[
    Path | None, typer.Option(help="Which deployment: the one of this pid file.", metavar="FILE", callback=at_home)
]


def register(app: typer.Typer) -> None:
    command = app.command(rich_help_panel="Operate")
    for function in (status, reload, restart, drain):
        command(function)


def status(
    port: Port = None,
    pid_file: PidFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.", metavar="")] = False,
) -> None:
    """Show what runs on this machine: addresses, processes and their states. Exit code 3: nothing does."""
    found, silent = _running(port, pid_file)
    for error in silent.values():
        print(f"another deployment: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=2))
    elif not found:
        print(_none(port, pid_file))
    for deployment in [] if as_json else found:
        _show(deployment)
    raise typer.Exit(0 if found else _NOT_RUNNING_EXIT_CODE)


def reload(port: Port = None, pid_file: PidFile = None) -> None:
    """Let every process read keys, secrets and certificates again; nothing restarts."""
    answer = _last(_say(_one(port, pid_file), {"command": "reload"}))
    if not answer["ok"]:
        raise KVFerryError(f"reload: {answer['error']}")
    print("every process has read keys, secrets and certificates again")


def restart(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One process (status shows them). Without a name: all.")
    ] = None,
    port: Port = None,
    pid_file: PidFile = None,
) -> None:
    """Restart every process, or one, while the others serve; no request fails. Returns when all are back."""
    answer = _last(_say(_one(port, pid_file), {"command": "restart", "name": name}))
    if not answer["ok"]:
        raise KVFerryError("restart: not everything was restarted")


def drain(port: Port = None, pid_file: PidFile = None) -> None:
    """Take no new requests, let running answers finish, then end the deployment. Returns when it has ended."""
    deployment = _one(port, pid_file)
    answer = _last(_say(deployment, {"command": "drain"}))
    if not answer["ok"]:
        raise KVFerryError(f"drain: {answer['error']}")
    wait_for_end(int(deployment["pid"]))
    print("the deployment has ended")


def running_admins() -> list[str]:
    """Return each router's admin listener of the one deployment that runs. Raises ConfigError."""
    admins = _one(None, None, flags="--admin")["admin"]
    if not admins:
        raise ConfigError("admin: the deployment has no admin listener: start it with --admin-port, or give --admin")
    return list(map(str, admins))


def _one(port: int | None, pid_file: Path | None, *, flags: str = "--port or --pid-file") -> Mapping[str, Any]:
    found, silent = _running(port, pid_file)
    if not found:
        raise ConfigError(_none(port, pid_file))
    rows = [f"{each['http']} (process {each['pid']}{_admin(each)})" for each in found]
    rows += [f"process {pid}, which does not answer" for pid in silent]
    if len(rows) > 1:
        raise ConfigError(f"{len(rows)} deployments run: {', '.join(rows)}; choose one with {flags}")
    return found[0]


def _none(port: int | None, pid_file: Path | None) -> str:
    which = f"port {port}" if port is not None else str(pid_file) if pid_file is not None else "this user"
    return f"no deployment of {which} runs on this machine"


def _running(port: int | None, pid_file: Path | None) -> tuple[list[dict[str, Any]], dict[int, ConfigError]]:
    """Return the status of each deployment that answers, and by process why another one that may be meant does not.

    Raises ConfigError where none answers, but one should.
    """
    wanted = read_pid(pid_file) if pid_file is not None else None
    found, silent = [], dict[int, ConfigError]()
    for pid in running_pids(runtime_dir(environment())):
        if wanted not in (None, pid):
            continue
        try:
            answer = _last(_say({"pid": pid}, {"command": "status"}, limit_s=_STATUS_LIMIT_S))
        except NobodyListens:
            continue  # what a killed launcher left
        except ConfigError as error:  # it hangs, or is just ending
            silent[pid] = error
            continue
        if "http" not in answer:
            silent[pid] = ConfigError(f"process {pid} cannot say how it is: {answer['error']}")
        elif port is None or str(answer["http"]).endswith(f":{port}"):
            found.append(answer)
    if silent and not found:
        raise ConfigError("; ".join(map(str, silent.values())))
    return found, silent if port is None else {}  # one of that port has answered


def _say(
    deployment: Mapping[str, Any], command: dict[str, object], *, limit_s: float | None = None
) -> Iterable[dict[str, Any]]:
    return ask(socket_of(runtime_dir(environment()), int(deployment["pid"])), command, limit_s=limit_s)


def _last(answers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Show each step as it is told; return the last line."""
    for answer in answers:
        if "note" not in answer:
            return answer
        print(answer["note"], file=sys.stderr, flush=True)
    raise ConfigError("the deployment ended before it had answered")


def _show(deployment: Mapping[str, Any]) -> None:
    from rich.table import Table

    console = make_console()
    address = deployment["http"] or "not listening yet"
    console.print(
        f"{deployment['model']} at {address}: {deployment['state']}{_admin(deployment)} (process {deployment['pid']})",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("name", "role", "state", "pid", "restarts", ""):
        table.add_column(title)
    for row in deployment["processes"]:
        waits = "; ".join(row.get("waits_for", ()))
        table.add_row(
            *(str(row.get(key, "")) for key in ("name", "role", "state", "pid", "restarts")),
            f"waits: {waits}" if waits else "",
        )
    console.print(table)
    if (experts := deployment.get("experts")) is not None:
        console.print(_experts(experts), markup=False, soft_wrap=True)


def _admin(deployment: Mapping[str, Any]) -> str:
    return f", admin {', '.join(deployment['admin'])}" if deployment["admin"] else ""


def _experts(experts: Mapping[str, Any]) -> str:
    """Say how evenly experts are chosen, on the worker where that is worst; `kvferry experts show` has all."""
    of_rank = experts["rank_imbalance"]
    rank = "" if of_rank is None else f", the busiest rank {of_rank:.2f} times"
    times = f"{experts['imbalance']:.2f} times"
    return f"experts, of late: a layer's busiest one is chosen {times} as often as the mean{rank}"
