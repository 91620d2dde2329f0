"""A deployment drawn from a seed: a model of a random family, and settings that no answer may depend on.

    shared   what answers do depend on (types, forms of weights, ranks): the reference server has it too
    own      all else: pools, policy, blocks, memory, drafts, tiers, transport, routers
    blows    who dies under load

Settings are drawn as an operator may write them. What does not go together is refused at the start, by name; it is
left in, and counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.common.config import EngineConfig
from kvferry.models.config import ModelConfig
from kvferry.sizing.memory import cache_token_bytes

from ..adapters import write_adapter
from ..e2e.exactness_models import MAX_MODEL_LEN, ExactnessModel

_WITH_EXPERTS = tuple(
    "mixtral qwen3_moe qwen2_moe olmoe glm4_moe ernie4_5_moe hunyuan_v1_moe dots1 solar_open minimax_m2 gpt_oss "
    "exaone_moe granitemoe qwen3_vl_moe".split()
)
_GEMMA4, _LATENT = ("gemma4", "gemma4_borrowing", "gemma4_moe"), ("deepseek_v2", "deepseek_v3", "youtu", "mistral4")
_OF_OTHER_KEYS = (*_GEMMA4, *_LATENT, "glm4_moe_lite")  # which are not kept in int8
# One of each kind of parts comes as often as another.
FAMILIES = (
    ("llama", "qwen2", "qwen3", "granite", "smollm3", "arcee", "phi3", "seed_oss", "glm", "glm4", "ernie4_5", "olmo2"),
    ("mistral", "gemma2", "gemma3_text", "cohere2", "exaone4", "cwm", "olmo3", "ministral3", "hunyuan_v1_dense"),
    _GEMMA4,
    _WITH_EXPERTS,
    (*_LATENT, "glm4_moe_lite"),
    (
        *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2", "lfm2_moe", "granite4", "granite4_moe"),
        *("nemotron_h", "nemotron_h_moe", "falcon_h1"),
    ),
)
# The longest chat, of some 1,200 tokens, has room in the least of these, and so have three answers of 160.
_CACHED_TOKENS = (1_600, 2_500, 20_000)
_FLOAT32_BLOCK = 16  # tokens of the block whose bytes a checkpoint's writer tells


@dataclass(frozen=True)
class Drawn:
    """One deployment."""

    seed: int
    family: str
    shared: tuple[str, ...]
    own: tuple[str, ...]
    num_prefill: int
    num_decode: int
    blows: tuple[str, ...]
    every_s: float
    concurrency: int
    cached_tokens: int
    dtype: str
    adapter_ranks: tuple[int, ...]
    places: tuple[int, int] | None  # for adapters, in a step and in host memory; None: as many as there are

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(f"rank-{rank}" for rank in self.adapter_ranks)

    def write_adapters(self, model: ExactnessModel, folder: Path) -> tuple[str, ...]:
        """Write them into a folder. Returns the flags that serve them all at once."""
        if not self.adapters:
            return ()
        flags = ["--enable-lora"]
        for name, rank in zip(self.adapters, self.adapter_ranks, strict=True):
            write_adapter(folder / name, model.path, rank=rank, rslora=rank > 8, seed=rank)
            flags += ["--lora-modules", f"{name}={folder / name}"]
        return tuple(flags)

    def reference_flags(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Return those of a lone server of the same model and adapters, of ample memory and nothing else."""
        return (*self.shared, *adapters, "--prefill", "0", "--kv-cache-memory-bytes", "256MiB")

    def serve_flags(self, model: ExactnessModel, adapters: Sequence[str], folder: Path) -> tuple[str, ...]:
        """Return the others of a deployment that keeps its files in `folder`."""
        num_bytes = _token_bytes(model) * self.cached_tokens
        memory = ("--kv-cache-memory-bytes", str(num_bytes if self.dtype == "float32" else num_bytes // 2))
        few = () if self.places is None else ("--max-loras", self.places[0], "--max-cpu-loras", self.places[1])
        own = (word.replace("FOLDER", str(folder)) for word in self.own)
        return (*self.shared, *adapters, *map(str, few), *memory, *own)

    def __str__(self) -> str:
        words = " ".join((*self.shared, *self.own))
        size = f"{self.num_prefill} + {self.num_decode}, {self.cached_tokens} tokens"
        adapters = f", adapters {self.adapter_ranks} in {self.places}" if self.adapters else ""
        blows = f"{'/'.join(self.blows)} every {self.every_s:g} s"
        return f"{self.seed}: {self.family}{adapters}, {size}, {blows}, {words}"


def _token_bytes(model: ExactnessModel) -> int:
    """Return what a token takes in float32: of layers with windows all keys, and of others the states between."""
    engine = EngineConfig(model_dir=model.path, served_model_name=model.path.name, dtype="float32", device="cpu")
    return max(model.block_bytes // _FLOAT32_BLOCK, cache_token_bytes(engine, ModelConfig.from_dir(model.path)))


def draw(seed: int) -> Drawn:
    """Return the deployment of a seed."""
    source = random.Random(seed)
    family = source.choice(source.choice(FAMILIES))
    dtype = source.choice(("float32", "bfloat16", "bfloat16"))
    ranks = source.choice((1, 1, 2))
    shared = ["--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN)]
    shared += _shared(source, ranks, family)
    num_prefill, num_decode = source.choice(((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)))
    own = [word for flags in _own(source, has_prefill=num_prefill > 0) for word in flags]
    adapter_ranks = source.choice(((), (), (4,), (4, 16), (1, 8, 16)))
    places = source.choice(((1, 1), (2, 2), (1, 3))) if len(adapter_ranks) > 1 else None
    blows = ["kill", "pause", *(["rank"] if ranks > 1 else []), *source.choice(([], [], ["router"], ["restart"]))]
    return Drawn(
        seed=seed,
        family=family,
        shared=tuple(shared),
        own=tuple(own),
        num_prefill=num_prefill,
        num_decode=num_decode,
        blows=tuple(blows),
        every_s=source.choice((3.0, 5.0, 1_000.0)),
        concurrency=source.choice((2, 6, 12)),
        cached_tokens=source.choice(_CACHED_TOKENS),
        dtype=dtype,
        adapter_ranks=adapter_ranks,
        places=places,
    )


def _shared(source: random.Random, ranks: int, family: str) -> list[str]:
    flags = []
    if source.random() < 0.3:
        flags += ["--quantization", source.choice(("int8", "int4"))]
    if source.random() < 0.2 and family not in _OF_OTHER_KEYS:
        flags += ["--kv-cache-dtype", "int8"]
    if ranks > 1:
        flags += ["--tensor-parallel-size", str(ranks)]
        if family in _WITH_EXPERTS and source.random() < 0.5:
            flags += ["--enable-expert-parallel"]
    return flags


def _own(source: random.Random, *, has_prefill: bool) -> list[list[str]]:
    """Return each setting that is made, most of them seldom."""

    def seldom(*choices: list[str], chance: float = 0.35) -> list[list[str]]:
        return [source.choice(choices)] if source.random() < chance else []

    disk = ["--disk-cache-dir", "FOLDER/disk", "--disk-cache-bytes", "256MiB"]  # some 100,000 blocks of theirs
    tiers = [["--host-cache-memory-bytes", size, *more] for size in ("1MiB", "64MiB") for more in ([], disk)]
    drafts = [
        {"method": method, "num_speculative_tokens": number, "prompt_lookup_min": 1}
        for method, number in (("ngram", 1), ("ngram", 4), ("suffix", 4), ("suffix", 16))
    ]
    return [
        ["--policy", source.choice(("slo", "least_loaded", "least_loaded", "kv_cost", "round_robin"))],
        *seldom(*(["--block-size", size] for size in ("8", "32", "64", "128"))),
        *seldom(*(["--max-num-batched-tokens", number] for number in ("64", "100", "300"))),
        *seldom(*(["--max-num-seqs", number] for number in ("2", "5", "16"))),
        *seldom(["--swap-space", "0"], ["--swap-space", "1MiB"], ["--swap-space", "256MiB"]),
        *seldom(["--no-enable-prefix-caching"], disk, *tiers, chance=0.6),
        *seldom(*(["--speculative-config", json.dumps(config)] for config in drafts), chance=0.4),
        *seldom(["--max-local-prefill-tokens", "64"], *([["--no-local-prefill"]] if has_prefill else [])),
        *seldom(["--tpot-objective-ms", "30"], ["--tpot-objective-ms", "5"], chance=0.2),
        *seldom(["--ttft-objective-ms", "100000"], chance=0.2),
        *seldom(["--transfer", "ucx"]),
        *seldom(["--kv-checksum", "off"], chance=0.2),
        *seldom(["--num-threads", "1"], ["--num-threads", "3"]),
        *seldom(["--routers", "2"], ["--routers", "3"], chance=0.25),
    ]
