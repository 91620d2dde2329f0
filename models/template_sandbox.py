"""The sandbox of chat templates: Jinja's immutable one, in which every way to spend time or memory has a price.

    each pass of a loop, each call of a macro   one step, and a look at the clock
    + * % ~, {% set %} blocks, filters,
    methods of strings                          the size of the result, before it is made where it can be foretold
    filters that go through their value         each of its items

A template comes out of a model directory and its values from clients, so neither is trusted. Bytes are refused, and so
is what makes much of little without passing here (`encode`, `translate`, `to_bytes`, sums of lists). What a rendering
may spend is in `render_budget.py`. One operation within these bounds cannot be interrupted, and an operation that
nobody thought of might not have any: who renders for others does it in a process that can be killed
(router/helpers/chat_renderer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from typing import TypeVar

from jinja2 import nodes, pass_context
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .render_budget import RenderBudget, active_budget, check_items

MAX_NUMBER_BITS = 4096
MAX_WIDTH = 1000  # that a filter pads or indents to
MAX_DIGITS = 100  # that a number is rounded to
_PADS = frozenset({"center", "ljust", "rjust", "zfill"})
_WIDTH_FILTERS = frozenset({"center", "indent", "tojson", "batch", "slice"})
# They go through their value item by item, whatever it is.
_ITEM_FILTERS = frozenset(
    "batch dictsort groupby items join list map max min reject rejectattr reverse select selectattr slice sort sum "
    "tojson unique".split()
)
# Methods of strings, numbers and their types: bytes, and texts whose size their operands do not tell.
_NO_METHODS = frozenset({"encode", "from_bytes", "fromhex", "to_bytes", "translate"})
# Quadratic in what a client sends, or of no use in a prompt.
_NO_FILTERS = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_PERCENT_WIDTH = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{4})")
_FORMAT_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{4})")

N = TypeVar("N", bound=nodes.Node)


class GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said; it prints its body."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of all templates. Safe to render from several threads at once."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        del self.globals["lipsum"]
        for name in _NO_FILTERS:
            del self.filters[name]

    def guard_filters(self) -> None:
        """Call once all filters are there."""
        for name, function in self.filters.items():
            self.filters[name] = _guarded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        _check_binop(active_budget(), operator, left, right)
        return active_budget().spend(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, int, float, type)) and name in _NO_METHODS:
            raise SecurityError(f"the method {name}")
        if isinstance(owner, str):
            args = _counted_join(active_budget(), name, args)
            _check_method(active_budget(), owner, name, [*args, *kwargs.values()])
        return active_budget().spend(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        owner = getattr(value, "__self__", None)
        if wrapped is None or not isinstance(owner, str):
            return wrapped

        def checked(*args: object, **kwargs: object) -> str:
            _check_pattern(active_budget(), owner, _FORMAT_WIDTH, "{", [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the parts of `{% set %}` blocks, macros and the like, and charge for the text."""
        known = list(parts)
        active_budget().check_length(sum(map(len, known)))
        text = "".join(known)
        active_budget().spend(text)
        return text

    def join(self, *parts: object) -> str:
        """Join as the `~` operator does."""
        return self.concat([str(part) for part in parts])

    def step(self) -> str:
        active_budget().step()
        return ""


class _Metered(NodeTransformer):
    """Puts a step into every loop and macro, and the `~` operator under control."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join"), node.nodes, [], None, None).set_lineno(node.lineno)  # type: ignore[return-value]

    def _with_step(self, node: N) -> N:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))  # type: ignore[attr-defined]
        return node


def _check_binop(budget: RenderBudget, operator: str, left: object, right: object) -> None:
    if operator == "**":
        raise SecurityError("the ** operator")
    if operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            budget.check_length(len(left) + len(right))
        elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            check_items(len(left) + len(right))
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MAX_NUMBER_BITS:
                raise SecurityError(f"a number of more than {MAX_NUMBER_BITS} bits")
            return
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                budget.check_length(len(sized) * times)
                if not isinstance(sized, str):
                    check_items(len(sized) * times)
    elif isinstance(left, str):
        _check_pattern(budget, left, _PERCENT_WIDTH, "%", [right])


def _check_method(budget: RenderBudget, text: str, method: str, args: list[object]) -> None:
    width = max((arg for arg in args if isinstance(arg, int)), default=8)
    if method in _PADS:
        budget.check_length(width)
    elif method == "expandtabs":
        budget.check_length(len(text) + text.count("\t") * width)
    elif method == "replace":
        _check_replace(budget, text, args)
    elif method == "join" and args:
        _check_join(budget, text, args[0])


def _counted_join(budget: RenderBudget, method: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """Return what a string is to join as a list whose sizes can be seen."""
    if method == "join" and args and isinstance(args[0], Iterable) and not isinstance(args[0], (str, list, tuple)):
        return (list(budget.counted(args[0])), *args[1:])
    return args


def _check_replace(budget: RenderBudget, text: str, args: list[object]) -> None:
    match args:
        case [str() as old, str() as new, *_]:
            num_found = text.count(old) if len(new) > len(old) else 0
            budget.check_length(len(text) + num_found * (len(new) - len(old)))


def _check_join(budget: RenderBudget, separator: str, items: object) -> None:
    if isinstance(items, (list, tuple)):
        budget.check_length(len(separator) * len(items) + sum(_text_size(item) for item in items))


def _check_pattern(budget: RenderBudget, text: str, width: re.Pattern[str], sign: str, args: list[object]) -> None:
    """Check the length of a format that is filled in."""
    if width.search(text):
        raise SecurityError("a format with a width of four digits, or of a variable")
    budget.check_length(len(text) + text.count(sign) * max(map(_text_size, args), default=0))


def _text_size(value: object, depth: int = 0) -> int:
    """Return about how long a value is once it is printed."""
    if isinstance(value, str):
        return len(value)
    if depth > 8 or not isinstance(value, (list, tuple, Mapping)):
        return 64
    children = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return 2 + sum(4 + _text_size(child, depth + 1) for child in children)


def _guarded(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """Put the filter under the budget. It takes the context, so that nothing of it is computed while compiling."""
    kind = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def run(context: Context, *args: object, **kwargs: object) -> object:
        budget = active_budget()
        given = [*args[1:], *kwargs.values()]
        if name in _WIDTH_FILTERS and any(isinstance(arg, int) and arg > MAX_WIDTH for arg in given):
            raise SecurityError(f"{name} to more than {MAX_WIDTH}")
        if name == "round" and any(isinstance(arg, int) and abs(arg) > MAX_DIGITS for arg in given):
            raise SecurityError(f"round to more than {MAX_DIGITS} digits")
        if name == "sum":
            _check_sum(given)
        if args and name in _ITEM_FILTERS:
            args = (_priced(budget, args[0]), *args[1:])
        value = args[0] if args else None
        if name == "replace" and isinstance(value, str):
            _check_replace(budget, value, given)
        elif name == "join":
            if isinstance(value, Iterator):
                args = (value := list(value), *args[1:])
            _check_join(budget, str(given[0]) if given else "", value)
        elif name == "format" and isinstance(value, str):
            _check_pattern(budget, value, _PERCENT_WIDTH, "%", given)
        elif name == "indent" and isinstance(value, str):
            budget.check_length(len(value) + value.count("\n") * MAX_WIDTH)
        first = {"context": (context,), "environment": (context.environment,), "eval_context": (context.eval_ctx,)}
        return budget.spend(function(*first.get(kind.name if kind else "", ()), *args, **kwargs))

    return run


def _check_sum(given: list[object]) -> None:
    """Refuse a sum that starts with a list: lists are copied for each that is added. Without a start, lists fail."""
    if any(isinstance(start, Iterable) and not isinstance(start, str) for start in given):
        raise SecurityError("a sum of lists")


def _priced(budget: RenderBudget, value: object) -> object:
    """Charge for what a filter is to go through, at once or as it is gone through."""
    if isinstance(value, (str, list, tuple, range, Mapping, MappingView)):
        budget.go_through(len(value))
    elif isinstance(value, Iterator):
        return budget.counted(value)
    return value


def compile_environment(filters: Mapping[str, Callable[..., str]], values: Mapping[str, object]) -> Environment:
    """Make a sandbox with more filters and global values."""
    sandbox = TemplateSandbox()
    sandbox.filters.update(filters)
    sandbox.globals.update(values)
    sandbox.guard_filters()
    return sandbox
