"""ServeSettings as command-line options: names, groups and help come from its fields, so they cannot drift.

A flag hands its text on unparsed; `settings` parses it and checks it with the other layers. Knows nothing but typer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import typer

from .fields import ENV_PREFIX, ServeSettings, option_of, setting_keys
from .load import Raw, load, value_of
from .option import Option

_DEFAULTS = ServeSettings()
# What of a pool has a flag; the rest of it is for YAML and the environment.
_POOL_HELP = {
    "prefill": "Prefill workers; 0: decode workers do both.",
    "prefill_min_workers": "Least prefill workers when pools scale.",
    "prefill_max_workers": "Most prefill workers when pools scale.",
    "prefill_tensor_parallel_size": "Ranks of one prefill worker.",
    "prefill_quantization": "Weights of prefill workers, if other than of decode workers: --mixed-quantization.",
    "decode": "Decode workers.",
    "decode_min_workers": "Least decode workers when pools scale.",
    "decode_max_workers": "Most decode workers when pools scale.",
    "decode_tensor_parallel_size": "Ranks of one decode worker.",
    "decode_quantization": "Weights of decode workers, if other than of prefill workers: --mixed-quantization.",
}


class _Flag(NamedTuple):
    parameter: inspect.Parameter
    text: str  # "--no-local-prefill"
    key: str  # "local_prefill"
    value: bool | None = None  # what giving it means, where it takes no value


def with_settings(
    command: str, env: Callable[[], dict[str, str]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command the flags of `command`; it is called with its own arguments and `loaded`."""
    flags = {flag.parameter.name: flag for flag in _flags(command)}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters
        own = [p.replace(kind=p.KEYWORD_ONLY) for name, p in parameters.items() if name != "loaded"]

        def run(*, config: Path | None, **given: object) -> None:
            rest = {parameter.name: given.pop(parameter.name) for parameter in own}
            function(loaded=load(flags=_given(flags, given), env=env(), file=config), **rest)

        signature = [*(flag.parameter for flag in flags.values()), _config_parameter(), *own]
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        return run

    return decorate


def _given(flags: dict[str, _Flag], values: dict[str, object]) -> dict[str, Raw]:
    raws: dict[str, Raw] = {}
    for name, value in values.items():
        flag = flags[name]
        if value not in (None, False, []):
            raws[flag.key] = Raw(value if flag.value is None else flag.value, flag.text)
    return raws


def _flags(command: str) -> Iterator[_Flag]:
    for field in ServeSettings.model_fields:
        option = option_of(field)
        if command not in option.on:
            continue
        if field in ("prefill", "decode"):
            names = [name for name in _POOL_HELP if name.startswith(field)]
            for name in names if command == "serve" else [field]:
                metavar = "TEXT" if name.endswith("_quantization") else "N"
                yield _value_flag(name, _POOL_HELP[name], option, _dashed(name.removesuffix("_workers")), metavar)
        elif isinstance(value_of(_DEFAULTS, field), bool):
            yield from _switches(field, option)
        elif field == "model":
            kind = Annotated[str | None, typer.Argument(metavar="MODEL", help=option.help, show_default=False)]
            yield _Flag(_parameter(field, kind), "MODEL", field)
        else:
            text = _dashed(option.flag if option.flag and command != "serve" else field)
            yield _value_flag(field, option.help, option, text, _metavar(field))


def _value_flag(name: str, help_text: str, option: Option, text: str, metavar: str) -> _Flag:
    key = setting_keys()[name]
    default = value_of(_DEFAULTS, key)
    choices = _choices(name)
    if choices:
        help_text = f"{', '.join(choices)}. {help_text}"
    if default not in (None, ()):
        help_text += f" \\[default: {default}]"
    given = list[str] if default == () else str
    if (variable := ENV_PREFIX + name.upper()) != _variable(text):
        help_text += f" \\[variable: {variable}]"
    names = [text, option.short] if option.short else [text]
    kind = Annotated[
        given | None,  # type: ignore[valid-type]  # list[str] where the option is repeatable
        typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=option.panel, show_default=False),
    ]
    return _Flag(_parameter(name, kind), text, key)


def _switches(field: str, option: Option) -> Iterator[_Flag]:
    """Name `--no-x` where x is on by default, else `--x`; and the other one, hidden, that overrules a file."""
    default = value_of(_DEFAULTS, field)
    for name, value in ((f"no_{field}", False), (field, True)):
        short = [option.short] if option.short and value != default else []
        kind = Annotated[
            bool,
            typer.Option(
                _dashed(name),
                *short,
                help=option.help,
                hidden=value == default,
                rich_help_panel=option.panel,
                show_default=False,
                metavar="",
            ),
        ]
        yield _Flag(_parameter(name, kind, default=False), _dashed(name), field, value)


def _config_parameter() -> inspect.Parameter:
    text = f"YAML file of these settings. A flag wins over the variable {ENV_PREFIX}<NAME>, that over the file."
    return _parameter(
        "config", Annotated[Path | None, typer.Option("--config", help=text, rich_help_panel="Output", metavar="FILE")]
    )


def _parameter(name: str, annotation: object, *, default: object = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(flag: str) -> str:
    """Return the variable that one would guess from a flag."""
    return ENV_PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def _kinds(field: str) -> Iterator[object]:
    """Return the types that a field may have, without Annotated and Optional around them."""
    annotation = ServeSettings.model_fields[field].annotation
    for kind in (annotation, *get_args(annotation)):
        while get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        yield kind


def _choices(name: str) -> list[str]:
    if name not in ServeSettings.model_fields:
        return []
    return [str(choice) for kind in _kinds(name) if get_origin(kind) is Literal for choice in get_args(kind)]


def _metavar(field: str) -> str:
    kinds = set(_kinds(field)) if not _choices(field) else set()
    return "N" if kinds & {int, float} else "FILE" if Path in kinds else "TEXT"
