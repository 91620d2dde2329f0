from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from kvferry.common.errors import ConfigError, RequestError
from kvferry.models.token_bytes import DecoderRules, decoder_rules
from kvferry.models.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, 1984 times.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを 漢字",
    "नमस्ते दुनिया وَٱلسَّلَامُ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f600\n\t  spaces  ",
]
SPECIAL = ["<s>", "</s>", "<|日é|>"]


def _byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: few merges, so that most characters are split over tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("über alles"), AddedToken("ähm")])
    return backend


def _byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's kind: SentencePiece BPE whose unknown characters become byte tokens, and whose first space goes."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*sorted(set("".join(TEXTS[:3])) - {" "}), "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("\u2581", "\u2581")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIAL))
    return backend


def _metaspace() -> tokenizers.Tokenizer:
    backend = _byte_fallback()
    backend.decoder = decoders.Metaspace()
    return backend


def _no_decoder() -> tokenizers.Tokenizer:
    words = ["<unk>", *SPECIAL, "we", "sail", "\u00e9"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "metaspace": _metaspace,
    "no_decoder": _no_decoder,
}


@cache
def _pair(kind: str) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """The library's tokenizer and ours around it."""
    backend = KINDS[kind]()
    decoder = json.loads(backend.to_str())["decoder"]
    return backend, Tokenizer(backend, decoder_rules(decoder), special_tokens={"bos_token": "<s>"})


def _write_model_dir(path: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def _pushed(detokenizer: Detokenizer, ids: Sequence[int], sizes: Sequence[int]) -> str:
    """The ids pushed in groups of the given sizes (then one by one), and flushed."""
    parts, start = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        parts.append(detokenizer.push(ids[start : start + size]))
        start += size
    return "".join(parts) + detokenizer.flush()


kinds = st.sampled_from(sorted(KINDS))
any_ids = st.lists(st.integers(0, 420), max_size=40)
group_sizes = st.lists(st.integers(0, 5), max_size=8)
multilingual = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))


@pytest.mark.slow
@given(kind=kinds, ids=any_ids, sizes=group_sizes, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pushes_and_flush_add_up_to_the_text_decoded_at_once(
    kind: str, ids: list[int], sizes: list[int], skip: bool
) -> None:
    _, tokenizer = _pair(kind)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    assert _pushed(detokenizer, ids, sizes) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@given(kind=st.sampled_from(["byte_level", "metaspace", "no_decoder"]), ids=any_ids, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_the_library_decodes_them(kind: str, ids: list[int], skip: bool) -> None:
    backend, tokenizer = _pair(kind)
    assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@given(ids=any_ids, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_fallback_decodes_as_the_library_does_unless_bytes_are_invalid(ids: list[int], skip: bool) -> None:
    backend, tokenizer = _pair("byte_fallback")
    expected = backend.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in expected:
        assert tokenizer.decode(ids, skip) == expected
    else:
        assert "\ufffd" in tokenizer.decode(ids, skip)


@given(kind=st.sampled_from(["byte_level", "byte_fallback"]), text=multilingual)
@settings(max_examples=200, deadline=None)
def test_a_valid_text_streams_token_by_token_without_replacement_characters(kind: str, text: str) -> None:
    backend, tokenizer = _pair(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = backend.decode(ids, skip_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == decoded
    assert detokenizer.flush() == ""


@pytest.mark.slow
@given(kind=kinds, prompt=any_ids, ids=any_ids, sizes=group_sizes, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_an_answer_goes_on_exactly_where_its_prompt_ended(
    kind: str, prompt: list[int], ids: list[int], sizes: list[int], skip: bool
) -> None:
    _, tokenizer = _pair(kind)
    before = Detokenizer(tokenizer, skip_special_tokens=skip).push(prompt)
    answer = _pushed(Detokenizer(tokenizer, prompt, skip), ids, sizes)
    assert before + answer == tokenizer.decode([*prompt, *ids], skip)


def test_a_character_split_over_tokens_comes_out_when_it_is_complete() -> None:
    _, tokenizer = _pair("byte_fallback")
    ids = [4 + byte for byte in "🙂".encode()]  # byte tokens follow <unk> and three special tokens
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "🙂"]


def test_an_answer_finishes_the_character_that_its_prompt_began() -> None:
    _, tokenizer = _pair("byte_fallback")
    text_ids = tokenizer.encode("The quick brown fox")
    *begun, last = [4 + byte for byte in "🙂".encode()]
    detokenizer = Detokenizer(tokenizer, [*text_ids, *begun])
    assert detokenizer.push([last]) == "🙂"


def test_an_unfinished_character_is_one_replacement_character_at_the_end() -> None:
    _, tokenizer = _pair("byte_fallback")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([4 + byte for byte in "🙂".encode()[:3]]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    _, tokenizer = _pair("byte_level")
    special = SPECIAL.index("<|日é|>")  # the trainer puts them first
    ids = [*tokenizer.encode("hi"), special, *tokenizer.encode(" there")]
    assert tokenizer.decode(ids) == "hi there"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi<|日é|> there"
    assert special in tokenizer.special_ids


def test_a_token_has_its_bytes_and_a_text_to_show() -> None:
    _, tokenizer = _pair("byte_fallback")
    assert tokenizer.token_bytes(4 + 0xE2) == b"\xe2"
    assert tokenizer.token_text(4 + 0xE2) == "\ufffd"
    assert tokenizer.token_text(4 + 256) == " "
    assert tokenizer.token_bytes(1_000_000) == b"" == tokenizer.token_bytes(-1)


def test_bytes_of_all_tokens_are_the_bytes_of_the_text() -> None:
    _, tokenizer = _pair("byte_level")
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_special_tokens_around_a_text_come_from_the_files_post_processor(tmp_path: Path) -> None:
    backend = _byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = Tokenizer.from_dir(_write_model_dir(tmp_path, backend, bos_token="<s>", eos_token={"content": "</s>"}))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *plain]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_special_tokens_are_also_read_from_their_own_map(tmp_path: Path) -> None:
    _write_model_dir(tmp_path, _byte_level())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)


def test_truncation_and_padding_in_the_file_are_not_followed(tmp_path: Path) -> None:
    backend = _byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_dir(_write_model_dir(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("longer than two")) == "longer than two"


def test_threads_encode_the_same_text_to_the_same_ids() -> None:
    _, tokenizer = _pair("byte_level")
    expected = {text: tokenizer.encode(text) for text in TEXTS}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, TEXTS * 20)) == [expected[text] for text in TEXTS * 20]


def test_a_text_too_large_for_the_context_is_refused_before_it_is_tokenized() -> None:
    _, tokenizer = _pair("byte_level")
    assert tokenizer.encode("a" * 4096, max_tokens=10)
    with pytest.raises(RequestError, match="a context of 10 tokens takes at most 4256") as caught:
        tokenizer.encode("a" * 4257, max_tokens=10)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="has at least 6000 bytes"):
        tokenizer.encode("あ" * 2000, max_tokens=10)


def test_a_lone_surrogate_is_the_clients_error() -> None:
    _, tokenizer = _pair("byte_level")
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("\ud83d", max_tokens=10)


def test_a_chat_is_rendered_with_the_models_template_and_special_tokens(tmp_path: Path) -> None:
    _write_model_dir(tmp_path, _byte_level(), bos_token="<s>", chat_template="{{ bos_token + messages[0].content }}")
    assert _rendered(Tokenizer.from_dir(tmp_path)) == "<s>ahoy"
    other = tmp_path / "other.jinja"
    other.write_text("other {{ messages | length }}")
    assert _rendered(Tokenizer.from_dir(tmp_path, other)) == "other 1"
    (tmp_path / "plain").mkdir()
    assert Tokenizer.from_dir(_write_model_dir(tmp_path / "plain", _byte_level())).chat_template is None


def _rendered(tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None
    chat = [{"role": "user", "content": "ahoy"}]
    return tokenizer.chat_template.render(chat, special_tokens=tokenizer.special_tokens)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "tiktoken.model"])
def test_a_directory_with_another_librarys_tokenizer_alone_names_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(ConfigError, match=rf"has {re.escape(name)} but no tokenizer\.json; .*save_pretrained"):
        Tokenizer.from_dir(tmp_path)


def test_mistrals_tokenizer_is_saved_in_the_other_form(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"save_pretrained\('/.*', save_format='hf'\)$"):
        Tokenizer.from_dir(tmp_path)


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "Unheard"}}', "null"])
def test_a_broken_tokenizer_file_is_a_config_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}]},
    ],
)
def test_a_decoder_that_cannot_be_followed_exactly_is_refused(decoder: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="the tokenizer's decoder is"):
        decoder_rules(decoder)


def test_gemmas_decoder_keeps_the_leading_space() -> None:
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    rules = decoder_rules({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]})
    assert rules == DecoderRules(byte_fallback=True, replacements=(("\u2581", " "),))
