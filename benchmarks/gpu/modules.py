"""The native modules of FlashInfer that kvferry uses on a Hopper card, by short names.

    page rope norm silu sampling     whatever the model's heads are
    fa2_128 fa3_128_window fa2_64_window_cap decode_64_fp8 fa3_128_fp8 …
                                     attention: kind, head size, with a sliding window, capped scores, pages in 8 bits

    fa3mla_512_64 fa3mla_256_64      attention over latents of so many numbers, and so many that are turned

Kinds: `fa3` prompts and chunks, with queries in 8 bits where the pages are; `fa2` one-token rows with 4 or more queries
per KV head, prompts over 8-bit pages with queries in 16, and all of heads of 512; `decode` one-token rows with fewer
queries per KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

FUSED = ("page", "rope", "norm", "silu", "sampling")
# The first line is Llama-3-8B's shape, which all parts but the tests run. The others are what the tests with the marker
# gpu ask for, as an emulated run of them says (tests/emulation/test_gpu_tests.py).
ATTENTION = (
    *("fa2_128", "fa3_128", "fa2_128_window", "fa3_128_window", "fa2_128_fp8", "fa3_128_fp8"),
    *("fa2_64", "fa3_64", "fa2_64_window", "fa3_64_window", "fa2_64_fp8", "fa2_64_window_fp8", "fa3_64_fp8"),
    *("decode_64", "decode_64_window", "decode_64_fp8", "decode_64_window_fp8"),
    *("fa2_64_cap", "fa3_64_cap", "fa2_64_window_cap", "fa3_64_window_cap"),
    *("decode_128", "decode_256_window", "fa3_256_window", "fa2_512"),
)
LATENTS = ("fa3mla_512_64", "fa3mla_256_64")
MODULES = (*FUSED, *ATTENTION, *LATENTS)


def spec_of(name: str) -> Any:
    """Return FlashInfer's build specification. Raises ValueError for a name that is none."""
    if name in FUSED:
        return _fused()[name]()
    import torch
    from flashinfer.jit.attention import modules

    if name in LATENTS:
        queries, (_, *sizes) = torch.bfloat16, name.split("_")
        return modules.gen_batch_mla_module("fa3", queries, queries, queries, torch.int32, *map(int, sizes), False)
    kind, head_dim, *flags = name.split("_")
    if kind not in ("fa2", "fa3", "decode") or not head_dim.isdigit() or not {"window", "cap", "fp8"}.issuperset(flags):
        raise ValueError(f"no module is called {name!r}")
    pages = torch.float8_e4m3fn if "fp8" in flags else torch.bfloat16
    queries = pages if kind == "fa3" else torch.bfloat16
    dtypes = (queries, pages, torch.bfloat16, torch.int32)
    shape = (int(head_dim), int(head_dim), 0, "window" in flags, "cap" in flags)  # no position encoding
    if kind == "decode":
        return modules.gen_batch_decode_module(*dtypes, *shape)
    if kind == "fa2":
        return modules._gen_batch_prefill_primary_module(kind, *dtypes, *shape, False)
    return modules.gen_batch_prefill_module(kind, *dtypes, *shape, False)


def _fused() -> dict[str, Callable[[], Any]]:
    from flashinfer.jit.activation import gen_act_and_mul_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.rope import gen_rope_module
    from flashinfer.jit.sampling import gen_sampling_module

    return {
        "page": gen_page_module,
        "rope": gen_rope_module,
        "norm": gen_norm_module,
        "silu": lambda: gen_act_and_mul_module("silu"),
        "sampling": gen_sampling_module,
    }


def build(names: tuple[str, ...] = MODULES) -> dict[str, tuple[str, Path]]:
    """Compile what is neither prebuilt nor in FlashInfer's cache, all in one run of ninja.

    Returns by short name FlashInfer's own name and the library.
    """
    from flashinfer.jit.core import build_jit_specs

    specs = {name: spec_of(name) for name in names}
    build_jit_specs(list(specs.values()), verbose=False)
    return {name: (spec.name, _library(spec)) for name, spec in specs.items()}


def _library(spec: Any) -> Path:
    prebuilt = Path(spec.aot_path)
    return prebuilt if prebuilt.exists() else Path(spec.jit_library_path)
