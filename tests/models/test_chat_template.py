from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError, RequestError
from kvferry.models import chat_template
from kvferry.models.chat_template import ChatTemplate, load_chat_template
from kvferry.models.render_budget import RenderLimits, TemplateOverrun
from kvferry.tests.fake_clock import FakeClock

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO: list[dict[str, object]] = [{"role": "user", "content": "hello"}]


class SlowClock(FakeClock):
    """Each look at the clock takes a second."""

    def now(self) -> float:
        self.advance(1.0)
        return super().now()


def test_messages_are_rendered_with_the_generation_prompt_when_asked_for() -> None:
    template = ChatTemplate(CHATML)
    asked = "<|im_start|>user\nhello<|im_end|>\n"
    assert template.render(HELLO) == asked + "<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == asked


def test_text_parts_are_joined_before_the_template_sees_them() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert ChatTemplate(CHATML).render([{"role": "user", "content": parts}]) == ChatTemplate(CHATML).render(HELLO)


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_a_message_without_content_reads_as_empty(message: dict[str, object]) -> None:
    assert ChatTemplate("[{{ messages[0]['content'] }}]").render([message]) == "[]"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, {"type": "text"}, "text", None])
def test_a_part_that_is_no_text_is_refused_by_its_place(part: object) -> None:
    last: dict[str, object] = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
    with pytest.raises(RequestError, match="only parts of the form") as caught:
        ChatTemplate(CHATML).render([*HELLO, last])
    assert caught.value.param == "messages[1].content[1]"


def test_content_of_another_type_is_refused() -> None:
    with pytest.raises(RequestError, match="a string or a list"):
        ChatTemplate(CHATML).render([{"role": "user", "content": 7}])


def test_the_callers_messages_stay_as_they_were() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    ChatTemplate(CHATML).render(messages, continue_final_message=True)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize("content", ["The capital is", "trailing space ", "", "<|im_end|>"])
def test_a_continued_message_ends_the_prompt_with_its_own_text(content: str) -> None:
    last: dict[str, object] = {"role": "assistant", "content": content}
    prompt = ChatTemplate(CHATML).render([*HELLO, last], continue_final_message=True)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n" + content


def test_a_message_that_the_template_hides_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="does not print the last message"):
        ChatTemplate("nothing").render(HELLO, continue_final_message=True)
    with pytest.raises(RequestError, match="no message to continue"):
        ChatTemplate(CHATML).render([], continue_final_message=True)


def test_special_tokens_and_template_arguments_are_variables() -> None:
    template = ChatTemplate("{{ bos_token }}{% if enable_thinking %}<think>{% endif %}{{ tools is none }}")
    assert template.render(HELLO, special_tokens={"bos_token": "<s>"}) == "<s>True"
    text = template.render(HELLO, special_tokens={"bos_token": "<s>"}, template_kwargs={"enable_thinking": True})
    assert text == "<s><think>True"


@pytest.mark.parametrize("name", ["messages", "range", "raise_exception", "bos_token", "add_generation_prompt"])
def test_template_arguments_replace_nothing_of_ours(name: str) -> None:
    with pytest.raises(RequestError, match=f"must not set {name}"):
        ChatTemplate(CHATML).render(HELLO, special_tokens={"bos_token": "<s>"}, template_kwargs={name: "x"})


def test_json_is_not_escaped_for_html_and_keeps_its_order() -> None:
    template = ChatTemplate("{{ value | tojson }} {{ value | tojson(indent=1) }}")
    value = {"b": "<é&'>", "a": [1, None]}
    expected = '{"b": "<é&\'>", "a": [1, null]} ' + json.dumps(value, indent=1, ensure_ascii=False)
    assert template.render(HELLO, template_kwargs={"value": value}) == expected


def test_blocks_are_trimmed_and_loops_have_controls_and_the_generation_tag_prints_its_body() -> None:
    source = (
        "{% for message in messages %}\n"
        "    {% if loop.index > 2 %}\n"
        "        {% break %}\n"
        "    {% endif %}\n"
        "{% generation %}{{ message.content }};{% endgeneration %}\n"
        "{% endfor %}\n"
    )
    messages = [{"role": "user", "content": text} for text in "abc"]
    assert ChatTemplate(source).render(messages) == "a;b;"


def test_the_date_comes_from_the_clock_that_was_passed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", now=lambda: 86_400 * 365 * 10)
    assert template.render(HELLO) == "1979"


def test_what_the_template_refuses_is_told_to_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match=r"^roles must alternate$") as caught:
        template.render(HELLO)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("source", ["{{ messages[0].missing.field }}", "{{ 'a' + 1 }}", "{{ messages[7].role }}"])
def test_messages_that_break_the_template_are_the_clients_error(source: str) -> None:
    with pytest.raises(RequestError, match="cannot render these messages: "):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | unheard_of }}", "{% if x %}", "{{" + "(" * 5000])
def test_a_broken_template_is_a_config_error_that_names_the_way_out(source: str) -> None:
    with pytest.raises(ConfigError, match="--chat-template FILE"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ 10 ** 10 ** 10 }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(ConfigError, match="the sandbox forbids"):
        ChatTemplate(source).render(HELLO)


def test_what_the_sandbox_forbids_for_some_messages_is_the_clients_and_names_no_file() -> None:
    """Hunyuan A13B's template changes a dict of its own where the first message is empty, as in `transformers`."""
    source = (
        "{% set known = {} %}{% if not messages[0].content %}{{ known.update(a=1) }}{% endif %}{{ messages[0].role }}"
    )
    template = ChatTemplate(source, origin="/srv/model/chat_template.jinja")
    assert template.render(HELLO) == "user"
    with pytest.raises(RequestError, match="sandbox forbids") as caught:
        template.render([{"role": "user", "content": ""}])
    assert (caught.value.status, caught.value.param) == (400, "messages") and "/srv" not in str(caught.value)
    with pytest.raises(ConfigError, match="sandbox forbids") as broken:
        ChatTemplate("{{ {}.update(a=1) }}", origin="/srv/model/chat_template.jinja").render(HELLO)
    assert "/srv" not in str(broken.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'aaaaaaaa' * 1000000000 }}",
        "{{ 1000000000 * [0] }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% for i in range(100) %}{{ 'a' * 1000000 }}{% endfor %}",
    ],
)
def test_a_prompt_that_grows_out_of_bounds_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match="more than 16777216 characters"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}",
    ],
)
def test_numeric_loops_share_one_limit(source: str) -> None:
    with pytest.raises(RequestError, match="loops over more than 100000 numbers"):
        ChatTemplate(source).render(HELLO)


def test_rendering_ends_at_its_time_limit() -> None:
    template = ChatTemplate("{% for i in range(1000) %}{{ i }}{% endfor %}", clock=SlowClock())
    with pytest.raises(RequestError, match="took more than 5 s"):
        template.render(HELLO)


def test_input_is_bounded_in_size_and_depth_and_type() -> None:
    template = ChatTemplate(CHATML)
    big = "a" * (chat_template.MAX_INPUT_CHARS // 2)
    with pytest.raises(RequestError, match="more than 8388608 characters"):
        template.render([{"role": "user", "content": big}], template_kwargs={"x": [big]})
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="chat_template_kwargs is nested more than 32 deep"):
        template.render(HELLO, template_kwargs={"x": deep})
    with pytest.raises(RequestError, match="holds a PosixPath"):
        template.render(HELLO, template_kwargs={"x": Path()})


# ---- contents as strings, or as lists of parts

GUARD = (  # as Llama Guard 3 1B's
    "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "<{{ m['role'] }}>{{ c['text'] | trim }}{% endfor %}{% endfor %}"
)
PARTS = [
    GUARD,
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}",
    "{% for m in messages %}{% if m.content[0].type == 'image' %}<image>{% else %}<{{ m.role }}>{% endif %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content | map(attribute='text') | join }}{% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ raise_exception('a list') }}{% endif %}"
    "{{ m.content[0]['text'] }}{% endfor %}",
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}<user>{{ messages[0].content[0].text }}",
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content[0].text }}{% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text | upper | lower }}{% endfor %}",
]
EITHER = (
    "{% for m in messages %}{% if m.content is string %}<string>{{ m.content }}{% else %}"
    "{% for c in m.content %}<part>{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)
MIXED = (  # its assistant's is a string
    "{% for m in messages %}{% if m.role == 'user' %}<user>{% for c in m.content %}{{ c.text }}{% endfor %}{% else %}"
    "<{{ m.role }}>{{ m.content + '.' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", PARTS)
@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hello"}]])
def test_a_template_that_takes_parts_gets_them(source: str, content: object) -> None:
    template = ChatTemplate(source)
    assert template.render([{"role": "user", "content": content}]) == "<user>hello"
    template.check_users({}, RenderLimits())


@pytest.mark.parametrize("source", PARTS)
def test_a_message_of_parts_is_continued_too(source: str) -> None:
    last: dict[str, object] = {"role": "user", "content": "to be"}
    assert ChatTemplate(source).render([last], continue_final_message=True) == "<user>to be"


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (CHATML, "<|im_start|>user\nhello<|im_end|>\n"),
        (EITHER, "<string>hello"),
        ("{{ messages[-1].content }}", "hello"),
        ("{{ messages[0]['content'] | upper }}", "HELLO"),
        ("{{ messages }}", str(HELLO)),
        ("{{ messages[-1].content if messages[-1].content == 'hello' }}", "hello"),
    ],
)
def test_a_template_that_takes_strings_gets_them(source: str, prompt: str) -> None:
    assert ChatTemplate(source).render(HELLO, add_generation_prompt=False) == prompt


def test_each_roles_content_has_the_form_that_the_template_takes_of_it() -> None:
    messages: list[dict[str, object]] = [*HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    assert ChatTemplate(MIXED).render(messages) == "<user>hello<assistant>hi.<user>hello"


def test_a_template_for_tools_may_take_the_other_form(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": GUARD}]
    template = load_chat_template(tmp_path, {"chat_template": named})
    assert template is not None
    assert template.render(HELLO) == ChatTemplate(CHATML).render(HELLO)
    assert template.render(HELLO, tools=[{"name": "f"}]) == "<user>hello"


def test_beside_calls_there_may_be_no_parts() -> None:
    source = GUARD + "{% if messages[-1].content %}said{% endif %}"
    calls = [{"function": {"name": "f", "arguments": {}}}]
    last: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": calls}
    assert ChatTemplate(source).render([*HELLO, last]) == "<user>hello"
    assert ChatTemplate(source).render([*HELLO, {"role": "assistant", "content": ""}]) == "<user>hello<assistant>said"


@pytest.mark.parametrize("source", ["", "Be brief.", "{% for m in messages %}{{ m.text }}{% endfor %}", "{{ tools }}"])
def test_a_template_that_tells_nothing_of_a_user_is_no_chats(source: str) -> None:
    with pytest.raises(ConfigError, match=r"prints nothing of what a user says.*--chat-template FILE"):
        ChatTemplate(source).check_users({}, RenderLimits())


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no') }}", "{{ messages[7].content.x }}", "{{ {}.update(a=1) }}"]
)
def test_of_a_template_that_takes_no_probe_nothing_is_known(source: str) -> None:
    ChatTemplate(source).check_users({}, RenderLimits())


def test_a_probe_is_no_longer_than_a_chat_may_be() -> None:
    with pytest.raises(TemplateOverrun):
        ChatTemplate("{% for i in range(1000) %}{% endfor %}").check_users({}, RenderLimits(max_steps=100))


# ---- a last message that is continued

TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")


@pytest.mark.parametrize("source", [CHATML, TRIMMING])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", " The answer is \n\n", "\U000f0f0f"])
def test_a_message_is_continued_as_transformers_does_it(source: str, content: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: list[dict[str, object]] = [*HELLO, {"role": "assistant", "content": content}]
    told, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source).render(messages, continue_final_message=True) == told[0]
    assert told[0].endswith(content if source == CHATML else content.strip())


# ---- where the template comes from


def test_a_file_given_by_the_operator_comes_before_the_models_own(tmp_path: Path) -> None:
    config: dict[str, object] = {"chat_template": "config"}

    def rendered(override: Path | None = None) -> str:
        template = load_chat_template(tmp_path, config, override=override)
        assert template is not None
        return template.render(HELLO)

    assert rendered() == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"
    (tmp_path / "mine.jinja").write_text("mine")
    assert rendered(tmp_path / "mine.jinja") == "mine"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    template = load_chat_template(tmp_path, {"chat_template": named})
    assert template is not None and template.render(HELLO) == "plain"
    with pytest.raises(ConfigError, match=r"none of the chat templates \['rag'\] is named default"):
        load_chat_template(tmp_path, {"chat_template": named[:1]})


TOOL_USE = """
{%- macro kind(of) %}{{ of.type }}{% if of.inner %}[{{ kind(of.inner) }}]{% endif %}{% endmacro %}
{% set messages = messages[1:] %}
 <tool_call> {{ kind({'type': 'array', 'inner': {'type': 'int'}}) }}
  {% for tool in tools %}
{{ tool.name }}
  {% endfor %}

"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("default", [CHATML, "\n  {% for m in messages %}\n  {{ m.content }}  {% endfor %}\n", " a  "])
def test_a_chat_with_tools_is_written_by_the_template_for_them(tmp_path: Path, default: str, end: str) -> None:
    sources = {"default": default, "tool_use": TOOL_USE}
    named = [{"name": name, "template": source.replace("\n", end)} for name, source in sources.items()]
    template = load_chat_template(tmp_path, {"chat_template": named})
    assert template is not None
    assert template.render(HELLO) == ChatTemplate(default).render(HELLO)
    tools = [{"name": "f"}]
    told = template.render(HELLO, tools=tools)
    assert told == ChatTemplate(TOOL_USE).render(HELLO, tools=tools)
    assert "array[int]" in told and "f\n" in told


def test_further_templates_stand_in_a_folder_of_files(tmp_path: Path) -> None:
    """As transformers writes them now."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    template = load_chat_template(tmp_path, {})
    assert template is not None and "tools" in template.variables
    tools = [{"name": "f"}]
    assert template.render(HELLO, tools=tools) == ChatTemplate(TOOL_USE).render(HELLO, tools=tools)
    assert template.render(HELLO) == ChatTemplate(CHATML).render(HELLO)
    other = load_chat_template(tmp_path, {}, override=tmp_path / "chat_template.jinja")
    assert other is not None and "tools" not in other.variables


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None


@pytest.mark.parametrize("found", [7, ["x"], {"default": "x"}])
def test_a_template_of_another_type_is_a_config_error(tmp_path: Path, found: object) -> None:
    with pytest.raises(ConfigError, match="neither a string nor a list"):
        load_chat_template(tmp_path, {"chat_template": found})


def test_a_missing_template_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*gone\.jinja: No such file or directory$"):
        load_chat_template(tmp_path, {}, override=tmp_path / "gone.jinja")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"the chat template .*bytes\.jinja is no text in UTF-8$"):
        load_chat_template(tmp_path, {}, override=tmp_path / "bytes.jinja")


def test_a_template_of_more_than_a_mebibyte_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1048576"):
        ChatTemplate("a" * 1_048_577)
