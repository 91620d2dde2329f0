"""Figures that others have published of their engines, and what is computed for the same models, GPUs and loads.

Sources, in the order of the rows:
    NVIDIA    "Performance of TensorRT-LLM" (the project's docs/source/performance.md at v0.6.1), low latency: first
              token of one prompt, LLaMA 2 7B and 70B, FP16 on A100 (80 GB is taken) and FP8 on H100
    vLLM      its public performance benchmark (buildkite.com/vllm/performance-benchmark, build 9515), latency tests:
              eight prompts of 32 tokens, 128 tokens of answer, on H200
    DeepSeek  "DeepSeek-V3/R1 Inference System Overview" (2025-03): 14.8k output tokens/s of an H800 node in groups of
              18, 20 to 22 tokens/s of a stream, 4,989 tokens of KV on average. An H800 computes and reads as an H100
    SGLang    "Deploying DeepSeek with PD Disaggregation and Large-Scale Expert Parallelism on 96 H100 GPUs" (LMSYS,
              2025-05): 22.3k output tokens/s of a node in groups of nine, 2,000 tokens of prompt, some 100 ms a token.
              Its rate of prompts is no row here: the share of the peak that this model is given comes from it
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvferry.common.config import EngineConfig
from kvferry.models.config import ModelConfig
from kvferry.sizing.figures import Sizer
from kvferry.sizing.hardware import gpu_named
from kvferry.sizing.shapes import model_named
from kvferry.sizing.steps import Roofline, StepWork

WITHIN = 0.25
_LLAMA_7B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
_LLAMA_70B = _LLAMA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_LLAMA_3_8B = _LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
_LLAMA_3_70B = _LLAMA_70B | {"vocab_size": 128256}
_MIXTRAL = _LLAMA_3_8B | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
_FLOAT8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}

_Case = tuple[str, dict[str, object], str, int, int, float]  # name, model, GPU, how many, tokens, published ms
_FIRST_TOKENS: tuple[_Case, ...] = (
    ("7B, 128 tokens", _LLAMA_7B, "A100-80GB", 1, 128, 16),
    ("7B, 2,048 tokens", _LLAMA_7B, "A100-80GB", 1, 2048, 133),
    ("70B, 128 tokens", _LLAMA_70B, "A100-80GB", 4, 128, 47),
    ("70B, 2,048 tokens", _LLAMA_70B, "A100-80GB", 4, 2048, 377),
    ("7B in FP8, 128 tokens", _LLAMA_7B | _FLOAT8, "H100", 1, 128, 7),
    ("7B in FP8, 2,048 tokens", _LLAMA_7B | _FLOAT8, "H100", 1, 2048, 36),
    ("70B in FP8, 128 tokens", _LLAMA_70B | _FLOAT8, "H100", 4, 128, 26),
    ("70B in FP8, 2,048 tokens", _LLAMA_70B | _FLOAT8, "H100", 4, 2048, 109),
)
_ANSWERS: tuple[_Case, ...] = (
    ("Llama 3.1 8B", _LLAMA_3_8B, "H200", 1, 128, 833.5),
    ("Llama 3 70B", _LLAMA_3_70B, "H200", 4, 128, 2077.6),
    ("Mixtral 8x7B", _MIXTRAL, "H200", 2, 128, 1916.6),
)
_PROMPT, _ROWS = 32, 8  # of `_ANSWERS`
_NODE = 8  # GPUs


@dataclass(slots=True, frozen=True)
class Row:
    """A published figure beside the computed one."""

    source: str
    what: str
    published_ms: float
    computed_ms: float
    binding: str

    @property
    def error(self) -> float:
        return self.computed_ms / self.published_ms - 1

    @property
    def is_met(self) -> bool:
        return abs(self.error) <= WITHIN


def rows() -> Iterator[Row]:
    for name, model, gpu, count, tokens, published in _FIRST_TOKENS:
        time = _sizer(model, gpu, count, tokens).prompt(tokens)
        yield Row("NVIDIA", f"first token, {name}, {count} x {gpu}", published, time.expected_s * 1e3, time.binding)
    for name, model, gpu, count, tokens, published in _ANSWERS:
        sizer = _sizer(model, gpu, count, _PROMPT + tokens // 2)
        step = sizer.decode(_ROWS)
        total_s = sizer.prompt(_ROWS * _PROMPT).expected_s + (tokens - 1) * step.expected_s
        what = f"8 answers of {tokens} tokens, {name}, {count} x {gpu}"
        yield Row("vLLM", what, published, total_s * 1e3, step.binding)
    yield _deepseek("DeepSeek", 18, node_tokens_per_s=14_800, step_ms=1000 / 21, context=4989)
    yield _deepseek("SGLang", 9, node_tokens_per_s=22_300, step_ms=100.0, context=2000)


def _sizer(model: dict[str, object], gpu: str, count: int, context: int) -> Sizer:
    engine = EngineConfig(
        model_dir=Path("."),
        served_model_name="published",
        device="cuda",
        tensor_parallel_size=count,
        max_num_batched_tokens=8192,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model), encoding="utf-8")
        return Sizer(engine, ModelConfig.from_dir(Path(folder)), gpu_named(gpu), context)


def _deepseek(source: str, nodes: int, *, node_tokens_per_s: float, step_ms: float, context: int) -> Row:
    """A step of as many rows as yield the published rate at the published pace."""
    num_rows = round(nodes * node_tokens_per_s * step_ms / 1e3)
    steps = Roofline(gpu_named("H100"), model_named("deepseek-v3"), nodes * _NODE)
    terms = steps.terms(StepWork(decode_rows=num_rows, decode_context=num_rows * context))
    what = f"decode step of {num_rows:,} rows, DeepSeek-V3, {nodes * _NODE} x H100"
    return Row(source, what, step_ms, terms.total_s * 1e3, terms.binding)
