"""Matchers over real vocabularies: what they let come, that they follow from tokens alone, and what is not compiled."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kvferry.common.errors import ConfigError, RequestError
from kvferry.common.grammar import Grammar, GrammarBroken
from kvferry.grammar.formats import PATTERNS
from kvferry.grammar.limits import MAX_ENUM_MEMBERS, MAX_PROPERTIES
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.grammar.thinking import FirstMatcher
from kvferry.models.tokenizer import Tokenizer
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_come, may_end

EOS = frozenset({1, 3})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8, "pattern": "^[A-Zé]"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def _byte_level(path: Path) -> None:
    write_tokenizer(path, 512)


def _byte_fallback(path: Path) -> None:
    """Llama 2's kind."""
    pieces = ["<unk>", "</s>", "<s>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581"]
    pieces += ['{"', '":', *map(chr, range(33, 127)), "name", "age"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("\u2581", "\u2581"), ("{", '"'), ('"', ":")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _save(backend, path)


def _metaspace(path: Path) -> None:
    """A kind that the library does not know: the bytes of its tokens are told to it."""
    pieces = ["<unk>", "</s>", "<s>", "<end>", "\u2581", *map(chr, range(33, 127)), "\n", "\u2581a", "\u2581b"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    _save(backend, path)


def _save(backend: tokenizers.Tokenizer, path: Path) -> None:
    backend.add_special_tokens(["</s>", "<s>", "<end>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module", params=[_byte_level, _byte_fallback, _metaspace])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Vocabulary, Tokenizer]:
    """A model's vocabulary with 40 ids behind the last token."""
    path = tmp_path_factory.mktemp("model")
    write: Callable[[Path], None] = request.param
    write(path)
    tokenizer = Tokenizer.from_dir(path)
    return Vocabulary.from_dir(path, vocab_size=tokenizer.vocab_size + 40, eos_token_ids=EOS), tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("bytes")
    _byte_level(path)
    return Vocabulary.from_dir(path, vocab_size=512, eos_token_ids=EOS)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value).encode())


def allowed(matcher: FirstMatcher) -> list[int]:
    mask = matcher.mask()
    return [token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1]


def random_answer(matcher: FirstMatcher, draw: random.Random, *, max_tokens: int = 300) -> list[int] | None:
    """Take tokens until an end; None: there was none."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        choices = allowed(matcher)
        ends = [token for token in choices if token in EOS]
        token = draw.choice(ends if ends and draw.random() < 0.5 else choices)
        if token in EOS:
            return tokens
        matcher.accept([token])
        tokens.append(token)
    return None


def test_every_answer_that_ends_is_valid(model: tuple[Vocabulary, Tokenizer]) -> None:
    vocabulary, tokenizer = model
    first = compile_grammar(vocabulary, schema(PERSON))
    ended = 0
    for seed in range(30):
        tokens = random_answer(first.fork(), random.Random(seed))
        if tokens is not None:
            jsonschema.validate(json.loads(tokenizer.decode([4, *tokens])[len(tokenizer.decode([4])) :]), PERSON)
            ended += 1
    assert ended > 3


def test_the_masks_end_with_the_vocabulary_and_have_no_special_token_but_ends(
    model: tuple[Vocabulary, Tokenizer],
) -> None:
    vocabulary, tokenizer = model
    first = compile_grammar(vocabulary, Grammar("regex", rb"(.|\n)*"))
    found = set(allowed(first))
    assert found and max(found) < tokenizer.vocab_size
    assert found & tokenizer.special_ids <= EOS and found >= EOS & {1}
    assert len(first.mask()) == -(-(tokenizer.vocab_size + 40) // 32) * 4


def test_bytes_of_tokens_are_those_of_our_own_text(model: tuple[Vocabulary, Tokenizer]) -> None:
    vocabulary, tokenizer = model
    for token in range(tokenizer.vocab_size):
        if (
            token not in tokenizer.special_ids and tokenizer.token_bytes(token) != b"\xff"
        ):  # of no text, and a mark there
            assert vocabulary.tokenizer.decode_bytes([token]) == tokenizer.token_bytes(token)


@pytest.mark.slow
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 60), back=st.integers(0, 60))
def test_a_matcher_follows_from_its_tokens_alone(vocabulary: Vocabulary, seed: int, cut: int, back: int) -> None:
    """Stepped, replayed at once, forked, or rolled back: the same mask, byte for byte."""
    first = compile_grammar(vocabulary, schema(PERSON))
    draw, stepped, tokens = random.Random(seed), first.fork(), list[int]()
    for _ in range(cut):
        choices = [token for token in allowed(stepped) if token not in EOS]
        if not choices:
            break
        tokens.append(draw.choice(choices))
        stepped.accept(tokens[-1:])
    mask = stepped.mask()
    replayed = first.fork()
    replayed.accept(tokens)
    assert replayed.mask() == mask
    fork = stepped.fork()
    taken = back if back <= len(tokens) else len(tokens)
    stepped.rollback(taken)
    stepped.accept(tokens[len(tokens) - taken :])
    assert stepped.mask() == mask == fork.mask()
    assert first.mask() == compile_grammar(vocabulary, schema(PERSON)).mask(), "forks leave it where it was"


def test_a_token_that_does_not_fit_breaks_the_matcher_for_good(vocabulary: Vocabulary) -> None:
    matcher = compile_grammar(vocabulary, Grammar("regex", b"[ab]{3}"))
    wrong = next(token for token in range(4, 300) if token not in allowed(matcher))
    with pytest.raises(GrammarBroken):
        matcher.accept([wrong])
    with pytest.raises(GrammarBroken):
        matcher.mask()


def test_nothing_but_an_end_follows_a_finished_answer(vocabulary: Vocabulary) -> None:
    matcher = compile_grammar(vocabulary, Grammar("choice", b'["a"]'))
    before = may_end(matcher)
    matcher.accept(allowed(matcher)[:1])
    assert (before, may_end(matcher)) == (False, True) and set(allowed(matcher)) == EOS


def _texts(vocabulary: Vocabulary, grammar: Grammar) -> set[str]:
    """Return all answers of a small grammar."""
    found, waiting = set(), [(compile_grammar(vocabulary, grammar), "")]
    while waiting:
        matcher, text = waiting.pop()
        for token in allowed(matcher):
            if token in EOS:
                found.add(text)
                continue
            longer = matcher.fork()
            longer.accept([token])
            waiting.append((longer, text + vocabulary.tokenizer.decode_bytes([token]).decode()))
    return found


@pytest.mark.parametrize(
    ("kind", "text", "answers"),
    [
        ("choice", '["yes", "no", "", "\\"q\\\\"]', {"yes", "no", "", '"q\\'}),
        ("choice", '["\\u007f", "a\\u0000"]', {"\x7f", "a\0"}),
        ("regex", "a{1,2}|b", {"a", "aa", "b"}),
        ("lark", 'start: "x" ("y" | "z")', {"xy", "xz"}),
        ("lark", '// Lark\'s own\n?start: "x" last\n!last: "y" | "z"', {"xy", "xz"}),
        ("lark", '  !start : "x" | "y"', {"x", "y"}),
        ("lark", 'start[max_tokens=9]: "x" | "y"', {"x", "y"}),
        ("lark", 'root ::= "x" ("y" | "z")\n', {"xy", "xz"}),
        ("lark", 'root ::= ("y"{1,2})? "x?)*" # ("z"?)?\n', {"x?)*", "yx?)*", "yyx?)*"}),
        ("lark", 'root ::= (("y"? )) {2}', {"", "y", "yy"}),
        ("lark", r'root ::= [\u0041-\u0042] "\U0000005a\\u0041\x22"', {'AZ\\u0041"', 'BZ\\u0041"'}),
        ("lark", 'root ::= start "b" | restart # start\nstart ::= "start"\nrestart ::= "r"\n', {"startb", "r"}),
        ("lark", r"root ::= [\u005D\u002d\U0000007e]", {"]", "-", "~"}),
        (
            "lark",
            'root ::= num "\\nb"\nnum ::= "1" ws\nws ::= [ \\n]{0,2}',
            {f"1{blank}\nb" for blank in ("", " ", "\n", "  ", " \n", "\n ", "\n\n")},
        ),
        ("lark", 'root ::= a "bc"\na ::= "a" | "ab"', {"abc", "abbc"}),
        ("lark", 'root ::= x "y" | z "w"\nx ::= "x"{1,2}\nz ::= "x"{1,2} "y"', {"xy", "xxy", "xyw", "xxyw"}),
        ("lark", 'root ::= root- | "root" # root\nroot- ::= "a"', {"a", "root"}),
        ("json_schema", '{"enum": [1, "a", null]}', {"1", '"a"', "null"}),
    ],
)
def test_every_kind_has_its_own_answers(vocabulary: Vocabulary, kind: str, text: str, answers: set[str]) -> None:
    assert _texts(vocabulary, Grammar(kind, text.encode())) == answers


def test_each_of_a_few_names_comes_once_and_nothing_behind_them(vocabulary: Vocabulary) -> None:
    """As zod writes a record of two names, all of which must be there."""
    names = {"type": "string", "enum": ["a", "b"]}
    record = {"type": "object", "propertyNames": names, "additionalProperties": {"const": 1}, "required": ["a", "b"]}
    matcher = compile_grammar(vocabulary, schema(record))
    matcher.accept(vocabulary.tokenizer.greedy_tokenize('{"a":1,"b":1'))
    assert {vocabulary.tokenizer.decode_str([token]).strip(" ") for token in allowed(matcher)} == {"", "}", "\n"}


_FOLLOWED = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.router.bodies.grammars import asked_grammar
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
size = tokenizer.get_vocab_size()
vocabulary = Vocabulary.from_dir(Path(sys.argv[1]), vocab_size=size, eos_token_ids=frozenset({0}))
matcher = compile_grammar(vocabulary, asked_grammar(json.loads(sys.argv[2]), None).grammar)
for token in tokenizer.encode(sys.argv[3], add_special_tokens=False).ids:
    matcher.mask()
    matcher.accept([token])
print("followed", matcher.forced(), len(matcher.mask()))
"""
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_ZEROS = {"type": "tag", "begin": "<", "content": {"type": "json_schema", "json_schema": _SHARE}, "end": "0x"}
_OLDER_ZEROS = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": _SHARE, "end": "0</f>"}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"guided_grammar": 'start: P T "xt"\nP: /[a-z]+!/\nT: /bx*/'}, "abc!bx"),
        (
            {"guided_grammar": '%llguidance {"no_forcing": false}\nstart: P T "xt"\nP: /[a-z]+!/\nT: /bx*/ // the end'},
            "abc!bx",
        ),
        (
            {"guided_grammar": 'root ::= p t "xt" | "(" root ")"\np ::= [a-z]+ "!"\nt ::= "b" "x"*'},
            "abc!bx",
        ),
        ({"structured_outputs": {"structural_tag": {"format": _ZEROS}}}, "<1."),
        ({"response_format": {"type": "structural_tag", **_OLDER_ZEROS}}, "x<f>1.0"),
    ],
)
def test_bytes_that_a_client_s_grammar_forces_for_ever_are_not_looked_for(
    tmp_path: Path, asked: dict[str, Any], text: str
) -> None:
    """In a process of its own: the library would not come back."""
    write_tokenizer(tmp_path, 512)
    command = [sys.executable, "-c", _FOLLOWED, str(tmp_path), json.dumps(asked), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=True)
    assert done.stdout.startswith("followed ")


def test_a_forced_token_is_the_only_one_that_may_come(model: tuple[Vocabulary, Tokenizer]) -> None:
    vocabulary, _ = model
    keys = {"the_first_of_them": {"const": "a longer text"}, "other": {"type": "integer"}}
    given = schema({"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False})
    first, num_forced = compile_grammar(vocabulary, given), 0
    for seed in range(10):
        matcher, draw = first.fork(), random.Random(seed)
        while True:
            forced, choices = matcher.forced(), allowed(matcher)
            if forced is not None:
                num_forced += 1
                assert choices == [forced]
            token = draw.choice(choices)
            if token in EOS:
                break
            matcher.accept([token])
    assert num_forced >= 10 * len("the_first_of_them")  # of single letters, in some of these vocabularies


def test_where_only_an_end_can_follow_it_is_forced(vocabulary: Vocabulary, tmp_path: Path) -> None:
    _byte_level(tmp_path)
    one_end = Vocabulary.from_dir(tmp_path, vocab_size=512, eos_token_ids=frozenset({1}))
    for words, wanted in ((one_end, 1), (vocabulary, None)):
        matcher = compile_grammar(words, Grammar("regex", b"ab|abc"))
        matcher.accept(words.tokenizer.greedy_tokenize("ab"))
        assert matcher.forced() is None and may_end(matcher)
        matcher.accept(words.tokenizer.greedy_tokenize("c"))
        assert matcher.forced() == wanted


def test_white_space_of_json_is_bounded(vocabulary: Vocabulary) -> None:
    first = compile_grammar(vocabulary, schema({"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 1}))

    def takes(text: str) -> bool:
        matcher = first.fork()
        try:
            matcher.accept(vocabulary.tokenizer.greedy_tokenize(text))
        except GrammarBroken:
            return False
        return may_end(matcher)

    assert all(takes(text) for text in ("[1]", "[ 1 ]", "[\n  1\n]", "[\n" + 32 * " " + "1]"))
    assert not any(takes(text) for text in ("[  1]", "[\n\n1]", "[\n" + 33 * " " + "1]", "[\t1]", " [1]", "[1] "))


LETTER_LISTS = [list(letters) for length in range(4) for letters in itertools.product("abc", repeat=length)]
LETTERS: dict[str, Any] = {"type": "array", "items": {"enum": ["a", "b", "c"]}}
DRAFTS = [
    *("http://json-schema.org/draft-06/schema#", "http://json-schema.org/draft-07/schema#"),
    *("https://json-schema.org/draft/2019-09/schema", "https://json-schema.org/draft/2020-12/schema"),
]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "words",
    [
        {"contains": {"const": "a"}},
        {"not": {"items": {"const": "a"}}},
        {"uniqueItems": True},
        {"uniqueItems": True, "maxItems": 2, "minItems": 1},
        {"uniqueItems": True, "items": {"$ref": "#/$defs/letter"}, "$defs": {"letter": LETTERS["items"]}},
        {"uniqueItems": True, "items": {"type": "string", "pattern": "^[abc]$"}, "maxItems": 1},
    ],
)
def test_lists_follow_their_schema_in_the_words_of_each_draft(
    vocabulary: Vocabulary, draft: str, words: dict[str, Any]
) -> None:
    asked = {"$schema": draft, **LETTERS, **words}
    _check_lists(vocabulary, asked)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"allOf": [{"minItems": 1}]},
        {"additionalItems": {"const": "b"}, "allOf": [{}]},
    ],
)
def test_what_an_earlier_draft_has_for_places_leaves_other_items_unevaluated(
    vocabulary: Vocabulary, words: dict[str, Any]
) -> None:
    draft = "https://json-schema.org/draft/2019-09/schema"
    asked = {"$schema": draft, "type": "array", "items": [{"const": "a"}], "unevaluatedItems": False, **words}
    _check_lists(vocabulary, asked)


@pytest.mark.parametrize("draft", DRAFTS[2:])
@pytest.mark.parametrize("counts", [{}, {"minContains": 1}])
def test_what_a_list_contains_is_evaluated_from_draft_2020_12_on(
    vocabulary: Vocabulary, draft: str, counts: dict[str, Any]
) -> None:
    """Before, `items` and `additionalItems` alone do (core, 9.3.1.3); jsonschema has it otherwise."""
    words = {"contains": {"enum": ["a", "c"]}, "unevaluatedItems": {"enum": ["a", "b"]}, **counts}
    found = _taken_lists(vocabulary, {"$schema": draft, "type": "array", **words})
    rest = "ab" if "2019-09" in draft else "abc"
    assert found == [value for value in LETTER_LISTS if {*value} & {"a", "c"} and {*value} <= {*rest}]


def _check_lists(vocabulary: Vocabulary, asked: dict[str, Any]) -> None:
    """Exactly the lists of letters that are valid may be answers."""
    validator = jsonschema.validators.validator_for(asked)(asked)
    assert _taken_lists(vocabulary, asked) == [value for value in LETTER_LISTS if validator.is_valid(value)]


def test_compact_json_has_no_white_space(vocabulary: Vocabulary) -> None:
    pair = schema({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": " "}}, "required": ["a", "b"]})
    first = compile_grammar(vocabulary, Grammar("compact_json_schema", pair.text))
    for text, wanted in (('{"a":1,"b":" "}', True), ('{"a": 1,"b":" "}', False), ('{"a":1, "b":" "}', False)):
        matcher = first.fork()
        try:
            matcher.accept(vocabulary.tokenizer.greedy_tokenize(text))
        except GrammarBroken:
            assert not wanted, text
        else:
            assert wanted and may_end(matcher), text
    anything = compile_grammar(vocabulary, Grammar("compact_json_object", b""))
    anything.accept(vocabulary.tokenizer.greedy_tokenize('{"a":[1,{}]'))
    assert not may_come(anything) & set(vocabulary.tokenizer.greedy_tokenize(" \n"))


@pytest.mark.parametrize(
    "value", [{"x-guidance": {"lenient": True}}, {"properties": {f"p{i}": {} for i in range(2001)}}]
)
def test_compact_json_has_the_bounds_of_any(vocabulary: Vocabulary, value: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        compile_grammar(vocabulary, Grammar("compact_json_schema", schema(value).text))


def _taken_lists(vocabulary: Vocabulary, asked: dict[str, Any]) -> list[list[str]]:
    first = compile_grammar(vocabulary, schema(asked))

    def takes(value: list[str]) -> bool:
        matcher = first.fork()
        try:
            matcher.accept(vocabulary.tokenizer.greedy_tokenize(json.dumps(value)))
        except GrammarBroken:
            return False
        return may_end(matcher)

    return [value for value in LETTER_LISTS if takes(value)]


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize(
    ("grammar", "param", "match"),
    [
        (schema({"properties": {"a": {"items": {"not": {"pattern": "x"}}}}}), ".properties.a.items.not", "'not' at"),
        (schema({"anyOf": [{}, {"uniqueItems": True}]}), ".anyOf[1].uniqueItems", "keyword 'uniqueItems'"),
        (schema({"properties": {"not": {"if": {"multipleOf": 3}, "then": {}}}}), ".properties.not.if", "keyword 'if'"),
        (schema({"items": {"format": "color"}}), ".items.format", "keyword 'format'.*Unknown format: color"),
        (schema({"$ref": "#/$defs/x"}), ".$ref", "does not exist"),
        (schema({"$ref": "http://localhost/x"}), ".$ref", "does not fetch"),
        (schema({"$schema": "http://localhost/x#", "items": {"$ref": "#/$defs/a"}}), ".$schema", "names no draft"),
        (schema({"properties": {"a": {"pattern": "^x(?=y)"}}}), ".properties.a.pattern", "look-around"),
        (schema({"oneOf": [{"type": "string"}, {"pattern": "x"}]}), ".oneOf", "oneOf"),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), ".x-guidance", "x-guidance"),
        (schema({"type": "foo"}), ".type", "Invalid type: foo"),
        (
            schema({"properties": {"a": {"format": "color"}, "b": {"format": "date"}}}),
            ".properties.a.format",
            "keyword 'format' at 'properties.a.format'",
        ),
        (schema({"type": "object", "properties": {"a": {"type": "bar"}}}), ".properties.a.type", "Invalid type: bar"),
        (
            schema({"properties": {"a": {"uniqueItems": True}, "b": {"uniqueItems": False}}}),
            ".properties.a.uniqueItems",
            "keyword 'uniqueItems'",
        ),
        (
            schema({"properties": {"a": {"$ref": "#/nope"}, "b": {"$ref": "#/$defs/x"}}, "$defs": {"x": {}}}),
            ".properties.a.$ref",
            "does not exist",
        ),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "", "minimum"),
        (schema({"$ref": "#"}), "", "no answer"),
        (schema(False), "", "no answer"),
        (schema([]), "", "must be an object"),
        (Grammar("json_schema", b"{"), "", "is not JSON"),
        (Grammar("regex", b"("), "", "unclosed group"),
        (Grammar("regex", b"x{100000}"), "", r"repeats a part \{100000\} times"),
        (schema({"properties": {"a": {"pattern": "(y{9999}|x)"}}}), ".properties.a.pattern", "repeats a part"),
        (Grammar("lark", b"start: nobody"), "", "unknown name"),
        (Grammar("lark", b"nothing of this kind"), "", "not of its kind"),
        (Grammar("lark", b'start ::= "a"'), "", "No 'root' rule found"),
        (Grammar("lark", b'root ::= "a" missing'), "", "Rule 'missing' not found"),
        (Grammar("lark", b'root ::= "a\\'), "", "ends in its middle"),
        (Grammar("lark", b'root ::= aB a-b\naB ::= "a"\na-b ::= "b"'), "", "already exists"),
        (Grammar("lark", rb'root ::= "\ud83d\ude00"'), "", "no character"),
        (Grammar("xml", b"<a/>"), "", "is none of json_object"),
        (schema({"properties": {str(i): {} for i in range(5000)}}), "", f"limit is {MAX_PROPERTIES}"),
        (schema({"enum": list(range(10_000))}), "", f"limit is {MAX_ENUM_MEMBERS}"),
        (schema({"enum": list(range(20_000))}), "", "bytes; the limit is 65536"),
        (Grammar("choice", json.dumps(list("ab") * 1500).encode()), "", "has 3000 choices; the limit is 2000"),
        (schema(_nested(300)), "", "nested deeper than 32"),
        (Grammar("json_schema", b'{"a":' * 9000 + b"1" + b"}" * 9000), "", "nested deeper than 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_its_place(
    vocabulary: Vocabulary, grammar: Grammar, param: str, match: str
) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        compile_grammar(vocabulary, grammar)
    assert (caught.value.param, caught.value.status) == (param, 400)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", b"(a{1,1000}){1,1000}"),
        Grammar("regex", b"((((((a*)*)*)*)*)*)*b"),
        Grammar("regex", b"(a|aa)*"),
        Grammar("lark", b'start: start start | "a"'),
        schema({"type": "string", "maxLength": 10**6}),
        schema({"type": "array", "maxItems": 10**6}),
        schema({"enum": [f"{i}" for i in range(MAX_ENUM_MEMBERS)]}),
        schema(_nested(15)),
        schema(True),
        schema({"uniqueItems": False, "maxItems": 3.0, "minContains": 1, "unevaluatedItems": False}),
        schema({"properties": {"x-guidance": {"type": "string"}}}),
        schema({"properties": {"p": {"type": "string", "format": "path"}, "s": {"format": "password"}}}),
        schema({"type": "string", "format": "ipvanyaddress"}),
        schema({"$schema": "https://json-schema.org/draft-07/schema#", "items": [{"$ref": "#"}]}),
        *(schema({"type": "string", "pattern": pattern}) for pattern in PATTERNS),
        schema({"type": "string", "format": "e164", "pattern": "^\\+(?:[0-9]){6,14}[0-9]$"}),  # as zod writes it
        schema({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}),
        schema({"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}),
    ],
)
def test_what_looks_bad_and_is_not_is_served(vocabulary: Vocabulary, grammar: Grammar) -> None:
    assert any(compile_grammar(vocabulary, grammar).mask())


def test_any_of_many_properties_may_come_next(vocabulary: Vocabulary) -> None:
    """Without `required`, each of them is a rule of its own in one place."""
    properties = {f"p{number}": {"type": "null"} for number in range(2000)}
    matcher = compile_grammar(vocabulary, schema({"type": "object", "properties": properties}))
    draw = random.Random(0)
    for _ in range(8):
        choices = [token for token in allowed(matcher) if token not in EOS]
        assert choices
        matcher.accept([draw.choice(choices)])


def test_a_model_whose_answers_cannot_end_follows_no_grammar(tmp_path: Path) -> None:
    _byte_level(tmp_path)
    with pytest.raises(ConfigError, match="no end token"):
        Vocabulary.from_dir(tmp_path, vocab_size=512, eos_token_ids=frozenset())


def test_tokens_with_spaces_between_them_follow_no_grammar(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "<s>", "<end>", "we"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    _save(backend, tmp_path)
    with pytest.raises(ConfigError, match="puts spaces between tokens"):
        Vocabulary.from_dir(tmp_path, vocab_size=8, eos_token_ids=EOS)


_SLOW = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from kvferry.common.batch import BatchRow
from kvferry.common.grammar import Grammar
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.masks import find_mask
from kvferry.grammar.matching import Vocabulary, compile_grammar
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
vocabulary = Vocabulary.from_dir(Path(sys.argv[1]), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=frozenset({0}))
many = range(800)
rules = ["start: s \\"x\\"", "s: " + "|".join(f"r{i}" for i in many) + "|\\"yes\\"", *(f"r{i}: s s" for i in many)]
class Compiled:
    is_costly = False
    first = compile_grammar(vocabulary, Grammar("lark", "\\n".join(rules).encode()))
    matcher = staticmethod(first.fork)
seq = Sequence(RequestId("r"), 0, 0, [5], 1, SamplingParams(), grammar=Compiled())
for token in tokenizer.encode("yesyesyes", add_special_tokens=False).ids:
    found = find_mask(BatchRow(seq, 1))
    if found.failure:
        print(found.failure)
        break
    seq.token_ids.append(token)
"""


@pytest.mark.slow
def test_a_grammar_of_too_many_ways_ends_its_answer(tmp_path: Path) -> None:
    """In a process of its own: if it did not, each token would take seconds and more."""
    write_tokenizer(tmp_path, 512)
    command = [sys.executable, "-c", _SLOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100.0, check=True)
    assert "too ambiguous" in done.stdout
