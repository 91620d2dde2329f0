"""Answers that may call: what is text stays free, what is a call follows its schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import Grammar, GrammarBroken
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.grammar.thinking import FirstMatcher
from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.lazy import answering_grammar, free_grammar, is_guidable
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_end

EOS = 1
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "note", "parameters": {"type": "object", "properties": {"a": {}}}}},
]
ANSWER = Grammar("json_schema", b'{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}')
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
NOTE = '{"name": "note", "arguments": {"anything": ["at", "all"]}}'
GEMMA_ROME, GEMMA_PARIS = ('call:weather{city:<|"|>' + city + '<|"|>}' for city in ("Rome", "Paris"))
GEMMA_NOTE = 'call:note{anything:[<|"|>at < all<|"|>,{b:null,c:-1.5e3}],more:{}}'
PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 512)
    return Vocabulary.from_dir(path, vocab_size=512, eos_token_ids=frozenset({EOS}))


def _use(parallel: bool | None = None) -> ToolUse:
    return parse_tool_use(TOOLS, "auto", parallel)


def _no_special(text: str) -> int | None:
    return None


def _takes(matcher: FirstMatcher, vocabulary: Vocabulary, text: str) -> bool:
    try:
        matcher.accept(vocabulary.tokenizer.greedy_tokenize(text))
    except GrammarBroken:
        return False
    return may_end(matcher)


@pytest.mark.parametrize(
    ("parser", "good", "bad"),
    [
        (
            "hermes",
            [
                "",
                "no call",
                '{"x": [',
                "one <tool_cal",
                f"<think>so</think>I look. <tool_call>\n{ROME}\n</tool_call>",
                f"<tool_call>{NOTE}</tool_call>\n<tool_call>{ROME}</tool_call> done",
            ],
            [f"<tool_call>{PARIS}</tool_call>", "a<tool_call>b", f"<tool_call>{ROME}</tool_call><tool_call>{PARIS}"],
        ),
        (
            "nemotron_json",
            [
                "",
                "no call",
                "one <TOOLCAL",
                f"<think>so</think>I look. <TOOLCALL>[{ROME}]</TOOLCALL>\n",
                f"<TOOLCALL>[{NOTE}, {ROME}]</TOOLCALL> done",
            ],
            [f"<TOOLCALL>[{PARIS}]</TOOLCALL>", f"<TOOLCALL>{ROME}</TOOLCALL>", f"<TOOLCALL>[{ROME}, {PARIS}]"],
        ),
        (
            "gemma4",
            [
                "",
                "no call",
                '{"x": [',
                "one <|tool_cal",
                f"So. <|tool_call>{GEMMA_ROME}<tool_call|>",
                f"<|tool_call>{GEMMA_NOTE}<tool_call|>\n<|tool_call>{GEMMA_ROME}<tool_call|> done",
                '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:-3}<tool_call|>',
            ],
            [
                f"<|tool_call>{GEMMA_PARIS}<tool_call|>",
                "a<|tool_call>b",
                "<|tool_call>call:weather{days:3}<tool_call|>",
                '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:1.5}<tool_call|>',
                '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,more:1}<tool_call|>',
                f"<|tool_call>{GEMMA_ROME}<tool_call|><|tool_call>{GEMMA_PARIS}",
            ],
        ),
        (
            "json",
            ["", "no call {", " a", ROME, f"[{ROME},{NOTE}]", f"\n{NOTE}"],
            [PARIS, '{"x": 1}', f"[{ROME},{PARIS}]", f" {PARIS}"],
        ),
    ],
)
def test_calls_of_strict_tools_follow_their_schemas_and_text_is_free(
    vocabulary: Vocabulary, parser: str, good: list[str], bad: list[str]
) -> None:
    first = compile_grammar(vocabulary, free_grammar(_use(), Dialect(parser), _no_special))
    assert [text for text in good if not _takes(first.fork(), vocabulary, text)] == []
    assert [text for text in bad if _takes(first.fork(), vocabulary, text)] == []


@pytest.mark.parametrize("parser", ["hermes", "json"])
def test_tools_that_are_not_allowed_are_not_called(vocabulary: Vocabulary, parser: str) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[1:]}}
    mark = ("<tool_call>", "</tool_call>") if parser == "hermes" else ("", "")
    use = parse_tool_use(TOOLS, choice, None)
    first = compile_grammar(vocabulary, free_grammar(use, Dialect(parser), _no_special))
    assert all(_takes(first.fork(), vocabulary, text) for text in ("", "no call", NOTE.join(mark)))
    assert not any(_takes(first.fork(), vocabulary, text.join(mark)) for text in (ROME, PARIS))


@pytest.mark.parametrize(
    ("parser", "call"),
    [
        ("hermes", "<tool_call>{}</tool_call>"),
        ("nemotron_json", "<TOOLCALL>[{}]</TOOLCALL>"),
        ("gemma4", "<|tool_call>{}<tool_call|>"),
        ("llama3_json", "{}"),
        ("json", "{}"),
    ],
)
def test_an_answer_of_a_form_stands_for_itself_or_calls(vocabulary: Vocabulary, parser: str, call: str) -> None:
    grammar = answering_grammar(_use(parallel=False), Dialect(parser), _no_special, ANSWER)
    assert grammar is not None
    first = compile_grammar(vocabulary, grammar)
    rome, note, paris = (GEMMA_ROME, GEMMA_NOTE, GEMMA_PARIS) if parser == "gemma4" else (ROME, NOTE, PARIS)
    good = ['{"x": 3}', call.replace("{}", rome), call.replace("{}", note)]
    bad = ["text", "", '{"x": "a"}', call.replace("{}", paris), '{"x": 3}' + call.replace("{}", rome)]
    assert [text for text in good if not _takes(first.fork(), vocabulary, text)] == []
    assert [text for text in bad if _takes(first.fork(), vocabulary, text)] == []


def test_several_calls_come_only_where_they_may(vocabulary: Vocabulary) -> None:
    for parallel, wanted in ((True, True), (False, False)):
        grammar = answering_grammar(_use(parallel), Dialect("hermes"), _no_special, Grammar("json_object", b""))
        assert grammar is not None
        matcher = compile_grammar(vocabulary, grammar)
        assert _takes(matcher, vocabulary, f"<tool_call>{ROME}</tool_call>\n<tool_call>{NOTE}</tool_call>") == wanted
        matcher = compile_grammar(vocabulary, free_grammar(_use(parallel), Dialect("nemotron_json"), _no_special))
        assert _takes(matcher, vocabulary, f"<TOOLCALL>[{ROME}, {NOTE}]</TOOLCALL>") == wanted


def test_marks_that_are_special_tokens_are_named_by_their_ids(vocabulary: Vocabulary) -> None:
    ids = {"<tool_call>": 300, "</tool_call>": 301}
    matcher = compile_grammar(vocabulary, free_grammar(_use(), Dialect("hermes"), ids.__getitem__))
    matcher.accept([*vocabulary.tokenizer.greedy_tokenize("I look"), 300])
    with pytest.raises(GrammarBroken):
        matcher.fork().accept(vocabulary.tokenizer.greedy_tokenize(PARIS))
    matcher.accept([*vocabulary.tokenizer.greedy_tokenize(ROME), 301])
    assert may_end(matcher)


def test_references_stay_within_their_tool(vocabulary: Vocabulary) -> None:
    tree = {
        "type": "object",
        "$defs": {"Node": {"enum": ["leaf"]}},
        "properties": {"root": {"$ref": "#/$defs/Node"}},
        "required": ["root"],
    }
    tool = {"type": "function", "function": {"name": "plant", "strict": True, "parameters": tree}}
    use = parse_tool_use([tool], "auto", None)
    first = compile_grammar(vocabulary, free_grammar(use, Dialect("hermes"), _no_special))
    for root, wanted in (("leaf", True), ("stem", False)):
        call = json.dumps({"name": "plant", "arguments": {"root": root}})
        assert _takes(first.fork(), vocabulary, f"<tool_call>{call}</tool_call>") == wanted


@pytest.mark.parametrize("dialect", ["hermes", "json"])
def test_schemas_of_tools_are_put_in_other_words_as_those_of_answers_are(vocabulary: Vocabulary, dialect: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"kind": {"enum": ["point", "line"]}, "length": {"type": "integer"}},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "line"}}},
        "then": {"required": ["length"]},
    }
    tool = {"type": "function", "function": {"name": "draw", "strict": True, "parameters": parameters}}
    use = parse_tool_use([tool, TOOLS[0]], "auto", None)
    first = compile_grammar(vocabulary, free_grammar(use, Dialect(dialect), _no_special))
    mark = ("<tool_call>", "</tool_call>") if dialect == "hermes" else ("", "")
    for arguments, wanted in (
        ({"kind": "point"}, True),
        ({"kind": "line"}, False),
        ({"kind": "line", "length": 3}, True),
    ):
        call = json.dumps({"name": "draw", "arguments": arguments})
        assert _takes(first.fork(), vocabulary, call.join(mark)) == wanted


def test_a_schema_that_cannot_be_kept_is_refused(vocabulary: Vocabulary) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"uniqueItems": True}}}
    with pytest.raises(RequestError, match="uniqueItems"):
        use = parse_tool_use([tool], "auto", None)
        compile_grammar(vocabulary, free_grammar(use, Dialect("hermes"), _no_special))


def test_forms_whose_calls_are_no_json_are_left_to_the_model() -> None:
    for is_free in (True, False):
        assert not any(is_guidable(Dialect(name), is_free=is_free) for name in ("qwen3_coder", "mistral"))
        assert is_guidable(Dialect("granite"), is_free=is_free) != is_free
    assert answering_grammar(_use(), Dialect("hermes"), _no_special, Grammar("regex", b"a")) is None
