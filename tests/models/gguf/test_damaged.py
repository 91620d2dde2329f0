"""Files that were cut short, that claim what they have not, or that name no tokens: refused by name, or read right."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import structlog

from kvferry.common.errors import ConfigError
from kvferry.models.default import gguf_model_dir
from kvferry.models.gguf import header
from kvferry.models.gguf.config import gguf_generation_config, gguf_tokenizer_config
from kvferry.models.gguf.convert import convert_gguf
from kvferry.models.gguf.fields import GgufFields
from kvferry.models.gguf.tokenizer import write_gguf_tokenizer
from kvferry.models.tokenizer import Tokenizer

from ...checkpoints import write_checkpoint
from ...gguf_files import plain_tokens, write_as_gguf
from ...quantized import SHAPE

NONE = 0xFFFFFFFF
UINT8, UINT32, STRING, LIST = 0, 4, 8, 9

Add = Callable[[gguf.GGUFWriter], None]


# --- headers ----------------------------------------------------------------------------------------------------------


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _header(*fields: bytes, num_tensors: int = 0, num_fields: int | None = None) -> bytes:
    counts = struct.pack("<IQQ", 3, num_tensors, len(fields) if num_fields is None else num_fields)
    return b"GGUF" + counts + b"".join(fields)


def _field(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _list(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


TOKENS = _field("tokenizer.ggml.tokens", LIST, _list(STRING, 2, _text("a") + _text("b")))
HEADERS: dict[str, tuple[bytes, str]] = {
    "a list longer than the file": (
        _header(_field("x", LIST, _list(UINT8, 1 << 40))),
        f"field x claims {1 << 40} items; 4194304 are read in all",
    ),
    "a list a little longer than the file": (_header(_field("x", LIST, _list(UINT8, 100))), "ends within field x"),
    "many lists": (
        _header(*(_field(f"x{index}", LIST, _list(UINT8, 1 << 21, bytes(1 << 21))) for index in range(3))),
        "field x1 claims",
    ),
    "lists in lists": (_header(_field("x", LIST, _list(LIST, 1) * 3000)), "field x is of type 9, which is not read"),
    "a text longer than the file": (_header(_field("x", STRING, struct.pack("<Q", 1 << 50))), "ends within field x"),
    "a name longer than the file": (_header(struct.pack("<Q", 1 << 63)), "ends within field 1 of 1"),
    "more fields than it has": (_header(TOKENS, num_fields=3), "ends within field 2 of 3"),
    "fields without end": (_header(num_fields=1 << 60), f"its counts claims {1 << 60} items"),
    "tensors without end": (_header(num_tensors=1 << 60), f"its counts claims {1 << 60} items"),
    "dimensions without end": (
        _header(num_tensors=1) + _text("token_embd.weight") + struct.pack("<I", 1 << 31),
        f"tensor token_embd.weight has {1 << 31} dimensions",
    ),
    "a tensor behind the end": (
        _header(num_tensors=1) + _text("w") + struct.pack("<IQIQ", 1, 8, 0, 1 << 62),
        "ends before the place of tensor w",
    ),
    "a type that nobody knows": (_header(_field("x", 77, b"")), "field x is of type 77"),
    "nothing behind its name": (b"GGUF", "ends within its counts"),
    "another format": (b"PK\x03\x04" + bytes(64), "does not begin as a GGUF file does"),
    "nothing at all": (b"", "does not begin as a GGUF file does"),
    "a version to come": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "is of GGUF's version 4; 2 and 3 are read"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is in big-endian byte order"),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_cannot_be_true_is_refused_before_it_is_read(tmp_path: Path, damage: str) -> None:
    data, told = HEADERS[damage]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"m\.gguf is not a model that kvferry can read: m\.gguf:? .*{told}"):
        convert_gguf(tmp_path / "m.gguf", tmp_path, lambda _fraction: None)


@pytest.mark.slow
def test_a_file_that_was_cut_anywhere_is_refused_with_its_name(tmp_path: Path) -> None:
    path = _model(tmp_path)
    data = path.read_bytes()
    end = gguf.GGUFReader(path).data_offset
    for size in [*range(0, end, 997), end - 40, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"m\.gguf is not a model that kvferry can read"):
            convert_gguf(path, tmp_path, lambda _fraction: None)


def test_a_model_of_big_endian_machines_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "m-be.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    plain_tokens(300)(writer)
    _close(writer)
    assert gguf.GGUFReader(path).fields  # the library reads it, and would turn numbers of none of its blocks
    with pytest.raises(ConfigError, match=r"m-be\.gguf is in big-endian byte order, which no machine of kvferry's has"):
        gguf_model_dir(path, cache=tmp_path / "cache")


def test_a_kind_that_the_library_does_not_read_is_refused_where_it_is_written(tmp_path: Path) -> None:
    path = _model(tmp_path)
    data, name = path.read_bytes(), _text("blk.1.ffn_norm.weight")
    at = data.index(name) + len(name) + 4 + 8  # behind the count of its sizes, and its one size
    path.write_bytes(data[:at] + struct.pack("<I", gguf.GGMLQuantizationType.Q8_1) + data[at + 4 :])
    with pytest.raises(ConfigError, match=r"kvferry can read: blk\.1\.ffn_norm\.weight is Q8_1, which cannot be read"):
        convert_gguf(path, tmp_path, lambda _fraction: None)


def test_a_whole_file_passes_and_all_its_items_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _model(tmp_path)
    reader = gguf.GGUFReader(path)
    lists = [field for field in reader.fields.values() if field.types[0] is gguf.GGUFValueType.ARRAY]
    num_items = len(reader.fields) - 3 + len(reader.tensors) + sum(len(field.data) for field in lists)
    monkeypatch.setattr(header, "_MAX_ITEMS", num_items)  # three of the fields are the library's own
    header.check_header(path)
    monkeypatch.setattr(header, "_MAX_ITEMS", num_items - 1)
    with pytest.raises(ValueError, match="are read in all"):
        header.check_header(path)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _close(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def _model(folder: Path, *more: Add) -> Path:
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, "llama", shape=SHAPE)

    def fields(writer: gguf.GGUFWriter) -> None:
        plain_tokens(SHAPE.vocab_size)(writer)
        for add in more:
            add(writer)

    write_as_gguf(checkpoint, folder / "m.gguf", fields=fields)
    return folder / "m.gguf"


def _pieces(path: Path, tokens: list[str], **ids: int) -> GgufFields:
    """Write SentencePiece's tokens without a model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    for name, index in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    _close(writer)
    return GgufFields(gguf.GGUFReader(path))


@pytest.mark.parametrize("token", [NONE, SHAPE.vocab_size, SHAPE.vocab_size + 1])
def test_a_special_token_outside_the_vocabulary_is_none(tmp_path: Path, token: int) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for name in ("padding", "unknown", "eot", "eom"):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)

    with structlog.testing.capture_logs() as logs:
        model = gguf_model_dir(_model(tmp_path, add), cache=tmp_path / "cache")
    config, generation, tokens = (
        json.loads((model / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert "pad_token_id" not in config and "pad_token_id" not in generation
    assert generation["eos_token_id"] == 1
    assert not {"pad_token", "unk_token"} & tokens.keys()
    assert Tokenizer.from_dir(model).encode("ab")
    told = {entry["field"] for entry in logs if entry["event"] == "gguf_token_ignored"}
    names = () if token == NONE else ("eom", "eot", "padding", "unknown")  # by intention none
    assert told == {f"tokenizer.ggml.{name}_token_id" for name in names}


def test_an_unknown_token_outside_the_vocabulary_is_none_to_sentence_piece(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    fields = _pieces(tmp_path / "m.gguf", tokens, bos=1, eos=2, unknown=NONE, padding=len(tokens))
    write_gguf_tokenizer(tmp_path / "tokenizer.json", fields)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["unk_token"] is None
    config = gguf_tokenizer_config(fields, 64)
    assert {name: text for name, text in config.items() if name.endswith("_token")} == {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert gguf_generation_config(fields, {"bos_token_id": 1, "eos_token_id": 2})["eos_token_id"] == 2


def test_texts_that_begin_with_a_token_need_one(tmp_path: Path) -> None:
    fields = _pieces(tmp_path / "m.gguf", ["<unk>", "<s>", "</s>", "a"], bos=NONE)
    with pytest.raises(ValueError, match=r"a token that tokenizer\.ggml\.bos_token_id should name, and it names none"):
        write_gguf_tokenizer(tmp_path / "tokenizer.json", fields)


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        ("a zz", "the merge of 'a' and 'zz' needs the token 'zz', which is not there"),
        ("a c", "the merge of 'a' and 'c' needs the token 'ac', which is not there"),  # the library panics
        ("ab", "the merge 'ab' is not of two parts"),
        ("a b c", "the merge 'a b c' is not of two parts"),
    ],
)
def test_a_merge_of_what_is_no_token_is_refused_with_the_files_name(tmp_path: Path, merge: str, told: str) -> None:
    path = _model(tmp_path)
    data, plain = path.read_bytes(), _text("a b")
    at = data.index(plain)  # padding before the tensors takes what the merge is longer
    start = gguf.GGUFReader(path).data_offset
    changed = (data[:at] + _text(merge) + data[at + len(plain) :]).ljust(len(data), b"\0")
    path.write_bytes(changed[:start] + data[start:])
    with pytest.raises(ConfigError, match=rf"m\.gguf is not a model that kvferry can read: {told}"):
        convert_gguf(path, tmp_path, lambda _fraction: None)


def test_pieces_of_endless_length_are_refused_before_they_are_cut(tmp_path: Path) -> None:
    fields = _pieces(tmp_path / "m.gguf", ["<unk>", "<s>", "</s>", "a" * 100_000], bos=1)
    with pytest.raises(ValueError, match="its pieces are too long, up to 100000 characters"):
        write_gguf_tokenizer(tmp_path / "tokenizer.json", fields)
