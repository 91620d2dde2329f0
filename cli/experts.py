"""`kvferry experts`: how evenly a deployment's experts are chosen, and a plan of replicas for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ..common.config import ADMIN_KEY_VARIABLE
from ..common.errors import ConfigError
from .console import make_console
from .paths import at_home

_HOTTEST = 3  # experts of a worker that the table names

Count = Annotated[int, msgspec.Meta(ge=0)]


class _Layer(msgspec.Struct):
    layer: Count
    taken: Annotated[list[Count], msgspec.Meta(min_length=1)]


class _Worker(msgspec.Struct):
    role: str
    ranks: Annotated[int, msgspec.Meta(ge=1)]
    layers: list[_Layer]


class _Answer(msgspec.Struct):
    """An answer of /admin/experts, as far as a plan needs it."""

    workers: list[_Worker]


app = typer.Typer(help="Look at the experts of a mixture, and plan replicas of the busiest.", no_args_is_help=True)
Admin = Annotated[str | None, typer.Option(help="A router's admin listener.", metavar="URL")]
AdminKey = Annotated[
    str | None, typer.Option(envvar=ADMIN_KEY_VARIABLE, help="Its key.", metavar="KEY", show_envvar=True)
]


def register(root: typer.Typer) -> None:
    app.command()(show)
    app.command()(plan)
    root.add_typer(app, name="experts", rich_help_panel="Look")


@app.callback()
def experts() -> None:
    """Look at the experts of a mixture, and plan replicas of the busiest."""


def show(admin: Admin = None, admin_key: AdminKey = None) -> None:
    """Show how evenly each worker's experts are chosen, and which the most.

    Without --admin: of the deployment of this user that runs on this machine.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("worker", "role", "ranks", "choices", "busiest expert", "busiest rank", "most chosen (layer.expert)"):
        table.add_column(title)
    for worker in ask_workers(admin, admin_key):
        of_rank = worker["rank_imbalance"]
        table.add_row(
            *(str(worker[key]) for key in ("worker_id", "role", "ranks")),
            str(sum(sum(layer["taken"]) for layer in worker["layers"])),
            f"{worker['imbalance']:.2f}x",
            "" if of_rank is None else f"{of_rank:.2f}x",
            ", ".join(_hottest(worker)),
        )
    make_console().print(table)


def plan(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Where the plan goes.")],
    replicas: Annotated[int, typer.Option(help="Copies more in each layer, of all ranks.", metavar="N", min=0)],
    admin: Admin = None,
    admin_key: AdminKey = None,
    counts: Annotated[
        Path | None,
        typer.Option("--from", help="A saved answer of /admin/experts, not --admin.", metavar="FILE", callback=at_home),
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Count this pool's alone.", metavar="prefill|decode")] = None,
    ranks: Annotated[int | None, typer.Option(help="Of a worker. Default: as they have.", metavar="N", min=1)] = None,
) -> None:
    """Plan which rank holds which experts, the most chosen ones on several: a file for --expert-plan.

    Without --admin: from what the deployment of this user that runs on this machine has counted since its start.
    """
    from ..models.parts.expert_plan import ExpertPlan
    from ..sizing.experts import plan_experts, planned_imbalance

    workers = ask_workers(admin, admin_key) if counts is None else _saved(counts)
    workers = [worker for worker in workers if pool in (None, worker["role"])]
    sizes = sorted({int(worker["ranks"]) for worker in workers})
    if not workers:
        raise ConfigError(f"{'no worker' if pool is None else f'pool: no worker of {pool}'} has told of experts")
    if ranks is None and len(sizes) > 1:
        raise ConfigError(f"workers have {' and '.join(map(str, sizes))} ranks; choose with --pool or --ranks")
    taken = _summed(workers)
    planned = plan_experts(taken, ranks or sizes[0], replicas)
    try:
        out.write_text(planned.text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from None
    experts, num_ranks = planned.num_experts, planned.num_ranks
    even, num_held = ExpertPlan(experts, num_ranks), (experts + replicas) // num_ranks
    print(f"{out}: {len(taken)} layers of {experts} experts; each of {num_ranks} ranks holds {num_held}")
    print(
        f"choices of the busiest rank over the mean, by {sum(map(sum, taken.values())):,}: "
        f"{planned_imbalance(taken, even):.2f}x split evenly, {planned_imbalance(taken, planned):.2f}x with this plan"
    )


def _saved(file: Path) -> list[dict[str, Any]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    try:
        workers = msgspec.json.decode(content, type=_Answer).workers
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no answer of /admin/experts: {error}") from None
    return [msgspec.to_builtins(worker) for worker in workers]


def _summed(workers: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Add up, by layer, how often each expert was chosen on these workers. Raises ConfigError."""
    taken: dict[int, list[int]] = {}
    for layer in (layer for worker in workers for layer in worker["layers"]):
        known = taken.setdefault(int(layer["layer"]), [0] * len(layer["taken"]))
        if len(known) != len(layer["taken"]):
            raise ConfigError("experts: these workers have other numbers of experts: they serve several models")
        known[:] = [one + other for one, other in zip(known, layer["taken"], strict=True)]
    if not sum(map(sum, taken.values())) or len(set(map(len, taken.values()))) != 1:
        raise ConfigError("experts: nothing was counted, or layers have other numbers of experts")
    return taken


def ask_workers(admin: str | None, admin_key: str | None) -> list[dict[str, Any]]:
    """Return what a router knows of each worker's experts. Raises KVFerryError; ConfigError where it knows nothing."""
    from ..router.admin.explain_view import fetch
    from .operate import running_admins

    address = admin if admin is not None else running_admins()[0]
    workers: list[dict[str, Any]] = fetch(address, "/admin/experts", (admin_key or "").partition(",")[0])["workers"]
    if not workers:
        raise ConfigError(f"{address}: no worker has told of experts: the model has none, or nothing was computed yet")
    return workers


def _hottest(worker: Mapping[str, Any]) -> list[str]:
    """Name the experts whose choices are the largest part of their layer's, of late."""
    parts = [
        (count / total, layer["layer"], expert)
        for layer in worker["layers"]
        if (total := sum(layer["recently_taken"]))
        for expert, count in enumerate(layer["recently_taken"])
    ]
    best = sorted(parts, key=lambda part: (-part[0], *part[1:]))[:_HOTTEST]
    return [f"{layer}.{expert} {part:.0%}" for part, layer, expert in best]
