"""Model directories that want more than to be read: code, files elsewhere, templates that do not end."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kvferry.common.errors import ConfigError, RequestError
from kvferry.models.chat_template import ChatTemplate
from kvferry.models.config import ModelConfig
from kvferry.models.files import resolve_model
from kvferry.models.render_budget import RenderLimits, TemplateOverrun
from kvferry.models.stored.safetensors import safetensors_files
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.process import main

from ..router.fakes import write_model_dir

HELLO: list[dict[str, object]] = [{"role": "user", "content": "hello " * 200}] * 20
CODE = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = write_model_dir(tmp_path / "model")
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return path


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_a_model_that_brings_code_is_refused_wherever_it_says_so(model_dir: Path, name: str) -> None:
    file = model_dir / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | CODE))
    with pytest.raises(ConfigError, match=f"auto_map in {name}.*never runs"):
        resolve_model(str(model_dir))
    with pytest.raises(ConfigError, match="never runs"):
        Tokenizer.from_dir(model_dir)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("restored_logging")
def test_a_router_given_such_a_model_ends_with_2_and_says_why(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_dir / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **CODE}))
    with pytest.raises(ConfigError, match="never run"):
        ModelConfig.from_dir(model_dir)
    config = json.dumps({"port": 0, "model_dir": str(model_dir), "served_model_name": "m"})
    assert main(["--config-json", config]) == 2
    assert "auto_map" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", ".", ".."]
)
def test_an_index_names_files_beside_it_only(model_dir: Path, shard: str) -> None:
    (model_dir.parent / "outside.safetensors").write_bytes(b"")
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ConfigError, match="no file beside it"):
        safetensors_files(model_dir)


BOMBS = [
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{{ '{0}{0}{0}{0}{0}{0}{0}{0}{0}{0}'.format('a' * 2000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ ('a\\n' * 100000) | indent(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000) }}",
    "{{ ('a' * 1000000) | replace('', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb') }}",
    "{{ ('x' * 10000).join(['a'] * 100000) }}",
    "{{ (['a'] * 100000) | join('y' * 10000) }}",
    "{{ ('%(a)s' * 10000) % {'a': 'b' * 100000} }}",
    "{{ messages | tojson(indent=1000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ lipsum(n=100000) }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for a in 'aaaaaaaaaa' %}" * 9 + "x" + "{% endfor %}" * 9,
    "{% set x %}{% for i in range(20000) %}{{ messages[0].content }}{% endfor %}{% endset %}",
    "{{ (messages[0].content | attr('encode'))() }}",
    "{{ ''.join(range(90000) | map('center', 1000)) }}",
    "{{ ''.join((messages * 40000) | map(attribute='content')) }}",
    "{{ (messages * 40000) | map(attribute='content') | join }}",
    "{{ (messages * 40000) | join(attribute='content') }}",
    "{{ ('x' * 3000000) | list | sort | length }}",
    "{{ 'x '.__add__('') }}{{ ('x ' * 4000000).split() | length }}",
]

# Bytes, and much of little.
FORBIDDEN = [
    "{{ ('a'.encode() * 1000000000) | length }}",
    "{{ 'a'.encode().ljust(2000000000) | length }}",
    "{{ (5).to_bytes(2000000000, 'big') | length }}",
    "{% set f = 'a'.encode %}{{ f() }}",
    "{{ ('a' * 4000).translate({97: 'a' * 4000}) }}",
    "{{ (range(9999) | map('string') | list | batch(1) | list) | sum(start=[]) | length }}",
    "{{ ([[1] * 900000] * 100) | sum(start=()) }}",
    "{{ 1 | round(100000000, 'ceil') }}",
]

# They go through ten thousand items, without making a list of as many.
ITEMS = [
    "numbers | max", "numbers | min", "numbers | sum", "numbers | unique | first", "numbers | reverse | first",
    "numbers | batch(3) | max", "numbers | select('none') | list", "numbers | map('abs') | max",
    "numbers | join | length", "numbers | tojson | length", "text | max", "numbers | sort | first",
    "','.join(numbers | map('string')) | length",
    "text.split() | first",
]  # fmt: skip

# After something outside of the sandbox: attributes of Python's own, files, what others see, what is not theirs.
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cla' ~ 'ss__') }}",
    "{{ [messages] | map(attribute='__class__.__mro__') | list }}",
    "{{ (messages | groupby('__class__'))[0].grouper }}",
    "{{ messages | selectattr('__class__') | map(attribute='role') | join }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ('{0.__class__.__init__}' | attr('format'))('') }}",
    "{{ '%s' | format(''.__class__) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% set g = messages | map('upper') %}{{ g.gi_frame }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop._iterator }}{% endfor %}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages.sort() }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ([0] * 100000000) | length }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ config }}{{ cycler.__init__ }}{{ joiner.__init__ }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_would_fill_memory_or_never_end_is_stopped(source: str) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((RequestError, ConfigError)):
        ChatTemplate(source).render(HELLO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 300 * 1024


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_has_no_price_is_forbidden(source: str) -> None:
    with pytest.raises(ConfigError, match="the sandbox forbids"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("expression", ITEMS)
def test_filters_pay_for_the_items_that_they_go_through(expression: str) -> None:
    source = "{% set numbers = range(1000) | list * 10 %}{% set text = 'x ' * 10000 %}"
    source += "{% for i in range(5) %}{{ " + expression + " }}{% endfor %}"
    assert ChatTemplate(source).render(HELLO)
    with pytest.raises(TemplateOverrun, match="more than 50000 items"):
        ChatTemplate(source).render(HELLO, limits=RenderLimits(max_items=50_000))


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_reach_out_of_the_sandbox(source: str) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source).render(messages)
    except (RequestError, ConfigError):
        text = ""
    assert not text.strip()  # what a template may not see is nothing to it
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("source", BOMBS[-6:])
def test_on_the_event_loop_it_is_stopped_early_and_may_be_tried_elsewhere(source: str) -> None:
    with pytest.raises((TemplateOverrun, RequestError, ConfigError)):
        ChatTemplate(source).render(HELLO, limits=RenderLimits(max_s=0.01, max_steps=100, max_chars=2**16))


def test_ordinary_templates_are_not_in_the_way_of_the_limits() -> None:
    source = (
        "{%- macro turn(role, text) -%}<|{{ role }}|>{{ text | trim | indent(2) }}{%- endmacro -%}"
        "{% for m in messages if m.role != 'x' %}{% set x %}{{ turn(m.role, m.content) }}{% endset %}"
        "{{ x ~ ('%s-%02d' % ('n', loop.index)) ~ '{}'.format(1) ~ ['a', 'b'] | join(',') ~ 'ab'.replace('a', 'bb') }}"
        "{% endfor %}{{ 'x'.center(9) }}{{ [1, 2] | map('string') | join }}{{ {'a': 1} | tojson(indent=2) }}"
    )
    text = ChatTemplate(source).render([{"role": "user", "content": "hi\nthere"}] * 2)
    assert text == (
        "<|user|>hi\n  theren-011a,bbbb<|user|>hi\n  theren-021a,bbbb" + "    x    " + "12" + '{\n  "a": 1\n}'
    )
