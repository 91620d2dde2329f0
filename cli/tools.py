"""`kvferry bench`, `chaos`, `simulate` and `size`: programs whose options are their own.

Each has an argparse parser, which its module run by itself uses too. Here that becomes a command like all others: the
same help, the same errors, completed by the shell. The program is imported when it is called or completed, not before:
each takes half a second.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_PROGRAMS = {
    "bench": ("tools.load.client", "Measure a running server: TTFT, TPOT and goodput under load."),
    "chaos": ("tools.chaos.command", "Kill workers of a deployment of its own under load; fails if anything is lost."),
    "simulate": ("simulator.commands.simulate", "Simulate a fleet under a trace: goodput, latencies, GPUs, cost."),
    "size": (
        "simulator.commands.size",
        "Size a model on given hardware: memory, step times, GPUs, cost, and what binds each.",
    ),
}
_OWN = ("help",)  # of argparse; typer has its own


class Commands(TyperGroup):
    """The commands of kvferry; those of programs get their options when they are looked at."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _PROGRAMS:
            command = _load(name)
        return name, command, rest


def register(app: typer.Typer) -> None:
    for name, (_, text) in _PROGRAMS.items():
        app.command(name, help=text, rich_help_panel="Measure")(lambda: None)  # for the list of commands


def _load(name: str) -> Any:
    module_name, text = _PROGRAMS[name]
    module = importlib.import_module(f"..{module_name}", __package__)
    parser: argparse.ArgumentParser = module.make_parser()
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, help=text)(_command(parser, module.main))
    return typer.main.get_command(single)


def _command(parser: argparse.ArgumentParser, main: Callable[[list[str]], int]) -> Callable[..., None]:
    """A function for typer with the parser's options, which hands what was given on to `main` as words."""
    options = {option.dest: option for option in parser._actions if option.dest not in _OWN}

    def run(**given: object) -> None:
        words = [word for name, value in given.items() for word in _words(options[name], value)]
        raise typer.Exit(main(words))

    parameters = [_parameter(option, _panel(parser, option)) for option in options.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _panel(parser: argparse.ArgumentParser, option: argparse.Action) -> str:
    groups = [group for group in parser._action_groups if option in group._group_actions]
    title = groups[0].title if groups else None
    return title.capitalize() if title and title != "options" else "Options"


def _parameter(option: argparse.Action, panel: str) -> inspect.Parameter:
    is_switch, is_list = option.nargs == 0, isinstance(option, argparse._AppendAction)
    help_text = (option.help or "").replace("%%", "%")
    if "%(default)" in help_text:
        help_text = help_text % {"default": option.default}
    elif option.default not in (None, False, []) and "default" not in help_text:
        help_text = f"{help_text} (default: {option.default})".lstrip()
    if option.choices is not None:
        help_text = f"{', '.join(map(str, option.choices))}. {help_text}"
    kind: Any = bool if is_switch else list[str] | None if is_list else str | None
    if not option.option_strings:
        argument = typer.Argument(metavar=_metavar(option), help=help_text, show_default=False)
        return inspect.Parameter(
            option.dest, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, argument]
        )
    shown = typer.Option(
        *option.option_strings,
        help=help_text.replace("[", r"\["),
        metavar="" if is_switch else _metavar(option),
        rich_help_panel=panel,
        show_default=False,
    )
    default = False if is_switch else None
    return inspect.Parameter(
        option.dest, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
    )


def _metavar(option: argparse.Action) -> str:
    if isinstance(option.metavar, str):
        return option.metavar
    return {int: "N", float: "X"}.get(option.type, "TEXT") if isinstance(option.type, type) else "TEXT"


def _words(option: argparse.Action, value: object) -> Iterator[str]:
    """The command line that says it again."""
    if not option.option_strings:
        yield from [] if value is None else [str(value)]
        return
    flag = option.option_strings[-1]
    if value is True:
        yield flag
    elif isinstance(value, list):
        for each in value:
            yield f"{flag}={each}"
    elif isinstance(value, str):
        yield f"{flag}={value}"
