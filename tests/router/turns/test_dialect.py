"""A model's dialect, read off its chat template, and what a template is given of tools."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.models.chat_template import ChatTemplate
from kvferry.router.turns.call_reader import joined_calls
from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.lazy import is_guidable
from kvferry.router.turns.syntax import Call

from .nemotron_templates import NANO_2, NANO_3

QWEN = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> in <tool_call></tool_call>{% endif %}{{ messages[0].content }}"
)
# Phi-4-mini's: tools are a message's field.
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# The end of OLMo 3's, of the models that think: it opens the tag, and knows of no end.
OLMO3_THINK = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}{% endfor %}"
)
USE = parse_tool_use([{"type": "function", "function": {"name": "f"}}], None, None)
NO_TOOLS = parse_tool_use(None, None, None)


def _dialect(source: str, *parsers: Any) -> Dialect:
    return Dialect.of_template(source, *parsers, variables=ChatTemplate(source).variables)


@pytest.mark.parametrize(
    ("source", "parser", "takes_tools", "reasoning"),
    [
        (None, "hermes", False, "none"),
        ("{{ messages }}", "hermes", False, "none"),
        (QWEN, "hermes", True, "none"),
        (QWEN + "{{ content.split('</think>') }}", "hermes", True, "think"),
        # Falcon's, of an array of calls.
        ("<tools>{{ tools|tojson }}</tools><tool_call>\n[\n  {}\n]\n</tool_call>", "hermes", True, "none"),
        ("{{ tools }}<tool_call><function=name>", "qwen3_coder", True, "none"),
        ("{{ tools }}<think></think><tool_call>{name}<arg_key>{key}</arg_key>", "glm", True, "think"),
        ("{{ tools }}<think><minimax:tool_call>", "minimax_m2", True, "think"),
        ("{{ tools }}<seed:think><seed:tool_call><function=name>", "seed_oss", True, "seed_oss"),
        ("{{ tools }}[TOOL_CALLS]", "mistral", True, "none"),
        (NANO_2, "nemotron_json", True, "think"),
        (NANO_3, "qwen3_coder", True, "think"),
        ("{{ tools }}<tool_calls>[...]</tool_calls><think>\n\n</think>", "hunyuan_a13b", True, "think"),
        ("{{ tools }}<tool_calls><tool_call>name\n```json", "hunyuan_a13b", True, "none"),
        ("{{ tools }}<|START_THINKING|><|START_ACTION|>", "cohere_command3", True, "cohere_command3"),
        ("{{ tools }}<|channel>thought\n<channel|>", "json", True, "gemma4"),
        ("{{ tools }}<|tool_call>call:name{}<tool_call|><|channel>thought", "gemma4", True, "gemma4"),
        ("{{ tools }}<think><｜tool▁calls▁begin｜>", "deepseek_v3", True, "think"),
        ("<think><｜tool▁calls▁begin｜>", "hermes", False, "think"),
        ("{{ tools }}respond only with <|tool_call|>", "granite", True, "none"),
        ("{{ tools }}functools[...]", "granite", True, "none"),
        ("{{ tools }}<think><function_calls>", "pythonic", True, "think"),
        ("<|start_header_id|>{{ tools }}[func_name1(params_name1=params_value1)]", "pythonic", True, "none"),
        ("{{ 'List of tools: <|tool_list_start|>' + tools + '<|tool_list_end|>' }}", "lfm2", True, "none"),
        ("{{ 'List of tools: [' + tools + ']' }}{{ content.split('</think>') }}", "lfm2", True, "think"),
        ("<|start_header_id|>{{ tools }}", "llama3_json", True, "none"),
        ("<|header_start|>{{ tools }}<|python_start|>", "llama3_json", True, "none"),
        ("{{ tools | tojson }}", "json", True, "none"),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", "json", True, "none"),
        (PHI4_MINI, "hermes", False, "none"),
        (OLMO3_THINK, "hermes", False, "think"),
        ("You have no tools.{% set thinking = false %}{{ message.thinking }}", "hermes", False, "none"),
    ],
)
def test_a_template_shows_its_dialect(source: str | None, parser: str, takes_tools: bool, reasoning: str) -> None:
    dialect = Dialect.of_template(None) if source is None else _dialect(source)
    assert (dialect.tool_parser, dialect.takes_tools, dialect.reasoning_parser) == (parser, takes_tools, reasoning)


def test_switches_are_variables_of_the_template() -> None:
    source = "{{ message.thinking }} thinking {% if enable_thinking is defined %}{{ reasoning_effort }}{% endif %}"
    assert _dialect(source).switches == {"enable_thinking", "reasoning_effort"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [("none", "none"), ("minimal", "none"), ("low", "high"), ("medium", "high"), ("high", "high"), ("xhigh", "high")],
)
def test_an_effort_is_the_nearest_that_a_template_knows(asked: str, told: str) -> None:
    settings = "{{ tools }}[TOOL_CALLS][THINK][MODEL_SETTINGS]{{ reasoning_effort }}[/MODEL_SETTINGS]"
    dialect = _dialect(settings)
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("mistral", "mistral")
    assert dialect.switches == {"reasoning_effort"}
    assert dialect.effort(asked) == told
    assert _dialect("{{ reasoning_effort }}").effort(asked) == asked  # of others it is as it was asked for


def test_a_template_may_look_for_words_in_place_of_switches() -> None:
    assert _dialect(NANO_2).has_switch_words and not _dialect(NANO_2).switches and _dialect(NANO_2).has_switch
    assert not _dialect(NANO_3).has_switch_words and _dialect(NANO_3).switches == {"enable_thinking"}
    assert not _dialect(QWEN).has_switch


def test_an_operator_knows_better() -> None:
    dialect = _dialect(QWEN, "qwen3_xml", "qwen3")
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("qwen3_coder", "think")
    dialect = _dialect(QWEN, "glm47", "glm45")
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("glm", "think")
    dialect = _dialect(QWEN, "nemotron_json", "nemotron_v3")
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("nemotron_json", "think")


@pytest.mark.parametrize(
    "parser",
    [
        "deepseek_v31",
        "qwen3_coder",
        "seed_oss",
        "glm45",
        "minimax_m2",
        "nemotron_json",
        "llama3_json",
        "pythonic",
        "granite",
        "mistral",
        "gemma4",
        "json",
    ],
)
def test_calls_have_the_form_that_was_told_or_the_named_one_where_a_template_takes_no_tools(parser: str) -> None:
    own = {
        "deepseek_v31": "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "qwen3_coder": "<tool_call><function=f></function></tool_call>",
        "seed_oss": "<seed:tool_call><function=f></function></seed:tool_call>",
        "glm45": "<tool_call>f</tool_call>",
        "minimax_m2": '<minimax:tool_call><invoke name="f"></invoke></minimax:tool_call>',
        "nemotron_json": '<TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>',
        "pythonic": "[f()]",
        "granite": '<|tool_call|>[{"name": "f", "arguments": {}}]',
        "mistral": "[TOOL_CALLS]f{}",
        "gemma4": "<|tool_call>call:f{}<tool_call|>",
    }.get(parser, '{"name": "f", "parameters": {}}')
    dialect = _dialect("{{ messages }}", parser)
    told = 'So. <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for text in (own, told):
        turn = dialect.reader(USE, begins_inside=False).push(text, is_final=True)
        assert [(call.name, call.arguments) for call in turn.calls] == [("f", "{}")], text
    strict = parse_tool_use([{"type": "function", "function": {"name": "f", "strict": True}}], None, None)
    turn = dialect.reader(strict, begins_inside=False).push(told, is_final=True)
    assert not turn.calls or not is_guidable(dialect, is_free=True), "it would pass by the grammar"
    assert not _dialect("{{ tools }}", parser).has_two_forms


def test_reasoning_begins_where_the_prompt_left_it() -> None:
    dialect = Dialect.of_template("</think>")
    assert dialect.begins_inside("...<think>\n") and not dialect.begins_inside("...<think>\n\n</think>\n\n")
    assert dialect.begins_inside("...", "<think>so far") and not dialect.begins_inside("...", "<think>so</think>far")
    always = Dialect.of_template("</think>", reasoning_parser="deepseek_r1")
    assert always.begins_inside("...") and not always.begins_inside("...</think>\n")


def test_an_answer_is_told_apart_where_the_template_opens_the_tag_alone() -> None:
    prompt = ChatTemplate(OLMO3_THINK).render([{"role": "user", "content": "hi"}])
    dialect = _dialect(OLMO3_THINK)
    reader = dialect.reader(ToolUse(), begins_inside=dialect.begins_inside(prompt))
    turn = reader.push("Okay, hm.\n</think>Hello!", is_final=True)
    assert (turn.reasoning, turn.content) == ("Okay, hm.", "Hello!")


def test_tags_may_be_others() -> None:
    dialect = _dialect("{{ tools }}[TOOL_CALLS][THINK]")
    assert (dialect.tool_parser, dialect.reasoning_parser) == ("mistral", "mistral")
    assert dialect.shown_marks(ToolUse()) == {"[THINK]", "[/THINK]"} and dialect.begins_inside("...[THINK]")
    text = '[THINK]Hm.[/THINK]So.[TOOL_CALLS]f[ARGS]{"a": 1}'
    told = dialect.reader(USE, begins_inside=False).push(text, is_final=True)
    assert (told.reasoning, told.content) == ("Hm.", "So.") and [call.name for call in told.calls] == ["f"]
    count = dialect.count(begins_inside=False)
    assert count is not None
    for number, piece in enumerate(("[THINK]", "Hm.", "[/THINK]", "So."), 1):
        count.push(piece, number)
    assert count.num_tokens == 3


@pytest.mark.parametrize(
    ("source", "text", "thoughts", "calls"),
    [
        ("<|extra_0|></think>", "<think>\nHm.\n</think>\n<answer>\nHi.\n</answer>", "Hm.", []),
        ("<｜hy_Assistant｜></think>", "<answer>\nHi.\n</answer>", "", []),
        (
            "{{ tools }}<tool_calls><think>",
            '<think>Hm.</think>Hi.<tool_calls>\n<tool_call>f\n```json\n{"a": 1}\n```</tool_call>\n</tool_calls>',
            "Hm.",
            [("f", '{"a": 1}')],
        ),
        (
            "{{ tools }}<|START_THINKING|><|START_ACTION|><|START_RESPONSE|>",
            '<|START_THINKING|>Hm.<|END_THINKING|>Hi.<|START_ACTION|>[{"tool_name": "f", "parameters": {"a": 1}}]'
            "<|END_ACTION|>",
            "Hm.",
            [("f", '{"a": 1}')],
        ),
        ("<|START_THINKING|><|START_RESPONSE|>", "<|START_RESPONSE|>Hi.<|END_RESPONSE|>", "", []),
        ("<|START_THINKING|><|START_RESPONSE|>", "Hi.<|END_RESPONSE|>", "", []),
        ("<|START_THINKING|><|START_RESPONSE|>", "Hi.", "", []),
    ],
)
def test_answers_of_hunyuan_and_command_are_told_apart_wherever_they_are_cut(
    source: str, text: str, thoughts: str, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 3, 7, len(text)):
        reader = _dialect(source).reader(USE, begins_inside=False)
        told = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
        told.append(reader.push("", is_final=True))
        assert "".join(each.reasoning for each in told) == thoughts
        assert "".join(each.content for each in told) == "Hi.", size
        found = joined_calls([call for each in told for call in each.calls])
        assert [(call.name, call.arguments) for call in found] == calls


def test_special_tokens_that_are_read_stay_in_the_text() -> None:
    assert _dialect("{{ tools }}[TOOL_CALLS]").shown_marks(USE) == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}
    assert Dialect.of_template("</think>").shown_marks(ToolUse()) == {"<think>", "</think>"}


def test_a_template_gets_the_tools() -> None:
    told = ChatTemplate(QWEN).render([{"role": "user", "content": "hi"}], tools=USE.told())
    assert told.startswith('<tools>[{"type": "function", "function": {"name": "f"') and told.endswith("hi")
    assert ChatTemplate(QWEN).render([{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize(
    ("text", "thoughts"), [("<|channel>thought\nHm.\n<channel|>So.", "Hm."), ("<|channel>thought\n<channel|>So.", "")]
)
def test_thoughts_of_gemma_4_are_read_however_they_are_cut(text: str, thoughts: str) -> None:
    dialect = _dialect("{% if enable_thinking %}{% endif %}<|channel>thought\n<channel|>")
    assert dialect.has_switch and dialect.shown_marks(NO_TOOLS) == {"<|channel>", "<channel|>"}
    assert not dialect.begins_inside("<|turn>model\n<|channel>thought\n<channel|>")
    for cut in range(len(text) + 1):
        reader = dialect.reader(NO_TOOLS, begins_inside=False)
        told = [reader.push(text[:cut]), reader.push(text[cut:]), reader.push("", is_final=True)]
        found = ["".join(getattr(each, name) for each in told) for name in ("reasoning", "content")]
        assert found == [thoughts, "So."]


def test_a_turn_of_seed_oss_is_read_however_it_is_cut() -> None:
    dialect = _dialect("{{ tools }}<seed:think></seed:think><seed:tool_call><function=name>")
    assert dialect.shown_marks(USE) == {"<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"}
    assert dialect.begins_inside("assistant\n<seed:think>") and not dialect.begins_inside("...</seed:think>")
    text = "<seed:think>\nHm.\n</seed:think>So.\n<seed:tool_call>\n<function=f>\n</function>\n</seed:tool_call>\n"
    for cut in range(len(text) + 1):
        reader = dialect.reader(USE, begins_inside=False)
        told = [reader.push(text[:cut]), reader.push(text[cut:]), reader.push("", is_final=True)]
        assert ["".join(getattr(each, name) for each in told) for name in ("reasoning", "content")] == ["Hm.", "So."]
        assert joined_calls([call for each in told for call in each.calls]) == [Call("f", "{}")]


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ("\n\n<response>\nSo.\n\nYes.\n</response>\n", "So.\n\nYes."),
        ("<response>So.", "So."),
        ("<response> </response>", ""),
        ("<response>a </response> b</response>", "a </response> b"),
        ("<response>a</respons", "a</respons"),
        ("\nSo: <response>.</response>", "So: <response>.</response>"),
        ("<resp", "<resp"),
        ("", ""),
    ],
)
def test_tags_around_an_answer_behind_thoughts_are_no_content(answer: str, content: str) -> None:
    """As Granite 3.3 and ERNIE 4.5 write them."""
    dialect = _dialect("Write <think></think> and <response></response>.")
    text = f"<think>\nHm. <response>\n</think>{answer}"
    for cut in range(len(text) + 1):
        for size in (1, 7, len(text)):
            reader = dialect.reader(ToolUse(), begins_inside=False)
            told = [reader.push(text[at : min(at + size, cut)]) for at in range(0, cut, size)]
            told += [reader.push(text[cut:]), reader.push("", is_final=True)]
            assert "".join(each.reasoning for each in told) == "Hm. <response>"
            assert "".join(each.content for each in told) == content


def test_tags_without_thoughts_before_them_are_what_the_client_asked_for() -> None:
    for dialect in (_dialect("<think></think><response></response>"), _dialect("<response></response>")):
        told = dialect.reader(ToolUse(), begins_inside=False).push("<response>So.</response>", is_final=True)
        assert told.content == "<response>So.</response>"


DRAFT = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "num_calls"),
    [
        (f"Hm, so.\n{DRAFT}", "Hm, so.", "", 1),
        (f"Hm.{DRAFT}\n{DRAFT}\n", "Hm.", "", 2),
        (DRAFT, "", "", 1),
        (f"First {DRAFT} or [x] < y.\n\n{DRAFT}", f"First {DRAFT} or [x] < y.", "", 1),
        (f"First {DRAFT} or not.", f"First {DRAFT} or not.", "", 0),
        (f"First {DRAFT}\n</think>So.", f"First {DRAFT}", "So.", 0),
        (f"First {DRAFT}</think>So.{DRAFT}", f"First {DRAFT}", "So.", 1),
        ("A <tool_call> is meant, <tool_", "A <tool_call> is meant, <tool_", "", 0),
        ('Hm.<tool_call>{"name": "f", "arguments": {"a": 1', "Hm.", "", 1),
    ],
)
def test_thoughts_that_never_end_end_before_the_calls_at_their_end(
    text: str, reasoning: str, content: str, num_calls: int
) -> None:
    dialect = _dialect("{{ tools }}<think></think><tool_call>")
    text = f"<think>\n{text}"
    for size in range(1, len(text) + 1):
        reader = dialect.reader(USE, begins_inside=False)
        told = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
        told.append(reader.push("", is_final=True))
        assert "".join(each.reasoning for each in told) == reasoning, size
        assert "".join(each.content for each in told) == content
        calls = joined_calls([call for each in told for call in each.calls])
        assert [call.name for call in calls] == ["f"] * num_calls and reader.has_called == bool(num_calls)


def test_thoughts_are_told_as_they_come_but_for_what_may_be_a_call() -> None:
    reader = _dialect("{{ tools }}<think></think><tool_call>").reader(USE, begins_inside=True)
    told = [
        reader.push(text).reasoning for text in ("Hm,", " so: <", "tool", " or <tool_call>", " it is.", DRAFT, " No.")
    ]
    assert told == ["Hm,", " so:", "", " <tool or", " <tool_call> it is.", "", f"{DRAFT} No."]
