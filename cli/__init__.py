"""The command `kvferry`: reads settings, checks them, and hands over to what does the work.

    serve, router, prefill, decode     cli/serve.py     a deployment, or one process of it
    status, reload, restart, drain     cli/operate.py   a deployment that runs
    explain, doctor, config, keys      cli/inspection.py, cli/keys.py
    experts                            cli/experts.py
    bench, chaos, simulate, size       cli/tools.py     programs with options of their own

A mistake of the operator's is a line on stderr and exit code 2, before anything is started. Neither torch nor ray is
imported here; what a subcommand alone needs is imported inside it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn, cast

from .. import __version__
from ..common.errors import ConfigError, KVFerryError
from ..common.imports import interruptible_imports, kept_imports

CONFIG_EXIT_CODE = 2

with kept_imports(), interruptible_imports():
    import typer

    from . import experts, inspection, keys, operate, other_flags, serve, tools
    from .hidden_keys import hide_keys

    app = typer.Typer(
        name="kvferry",
        help="Serve large language models with prefill and decode on separate worker pools.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        cls=tools.Commands,
    )
    for module in (serve, operate, inspection, experts, keys, tools):
        module.register(app)

_command_of = functools.cache(typer.main.get_command)

# Of the command line itself: an unknown option, a missing value. Typer shows its subclass alone.
_USAGE_ERROR: type[Exception] = cast("type[Exception]", typer.BadParameter.__mro__[1])


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the console script."""
    if argv is None:
        hide_keys()
        argv = sys.argv[1:]
    try:
        with interruptible_imports():  # making all flags takes as long as importing
            command = _command_of(app)
        code = command(args=_repeated(argv), prog_name="kvferry", standalone_mode=False)
    except typer.Abort:
        code = 1
    except (KVFerryError, _USAGE_ERROR) as error:
        code = CONFIG_EXIT_CODE if isinstance(error, ConfigError | _USAGE_ERROR) else 1
        print(f"kvferry: {_line(error, argv)}", file=sys.stderr)
    except PermissionError as error:  # of a path of the operator's: even to ask what is there may not be allowed
        if error.filename is None:
            raise
        code = CONFIG_EXIT_CODE
        print(f"kvferry: {error.filename}: {error.strerror}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _repeated(words: Sequence[str]) -> list[str]:
    """Give every adapter, and every name of the model, a flag of its own: vLLM's flags take all that follow.

    What follows a name is another one where the model has been named already, as vLLM's command has it in front.
    """
    is_model_first = len(words) > 1 and not words[1].startswith("-")
    done: list[str] = []
    for word in words:
        flag = done[-2] if len(done) > 1 and not word.startswith("-") else ""
        is_adapter = flag == "--lora-modules" and ("=" in word or word.startswith("{"))
        is_name = flag == "--served-model-name" and is_model_first
        done += [flag, word] if is_adapter or is_name else [word]
    return done


def _line(error: Exception, words: Sequence[str]) -> str:
    """Mistakes in flags and mistakes in files read alike; the first also tells where help is."""
    if not isinstance(error, _USAGE_ERROR):
        return str(error)
    context = getattr(error, "ctx", None)
    name = str(getattr(error, "option_name", ""))
    if context is not None and name in ("--model", "--model-path"):  # as other servers want it
        return f"{name}: there is no such flag, the model is the first word: {context.command_path} MODEL"
    if context is not None and type(error).__name__ == "NoSuchOption":
        name = other_flags.whole(name, words)
        if instead := other_flags.hint(name):
            return f"{name}: there is no such flag here: {instead} ({context.command_path} --help)"
    hint = f" ({context.command_path} --help)" if context is not None else ""
    message = error.format_message().strip() or "which command?"  # type: ignore[attr-defined]  # blank: help was shown
    return f"{message}{hint}"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kvferry {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.", metavar="")
    ] = False,
) -> None:
    pass
