"""GPUs attend by FlashInfer's kernels: in 16 bits, and with heads of few sizes. What they lack is known from a model's
shape, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from ...common.config import EngineConfig
from ...common.errors import ConfigError
from .latent import LatentConfig
from .uneven_heads import Heads

_DTYPES = ("bfloat16", "float16")
_HEAD_DIMS = (64, 128, 256, 512)
OLDER_HEAD_DIM = 512  # has kernels of the older kind (fa2) alone, over pages in 16 bits


class Attending(Protocol):
    """A `ModelConfig`, as far as attention goes."""

    @property
    def dtype(self) -> str: ...

    @property
    def num_qo_heads(self) -> int: ...

    @property
    def latent(self) -> LatentConfig | None: ...

    @property
    def kv_layers(self) -> tuple[int, ...]: ...

    def heads_of(self, layer: int) -> Heads: ...


def weights_dtype(engine: EngineConfig, model: Attending, *, is_cuda: bool) -> Literal["float32", "bfloat16"]:
    """Return what weights are stored and multiplied in, where they are not in fewer bits."""
    if engine.dtype != "auto":
        return engine.dtype
    # Float16 weights run in bfloat16: no half-precision products on CPUs, no overflow anywhere. So do those in float32
    # on a GPU, which does not attend in it.
    return "float32" if model.dtype == "float32" and not is_cuda else "bfloat16"


def check_gpu(engine: EngineConfig, model: Attending, drafting: Iterable[Attending] = ()) -> None:
    """Refuse a model that GPUs have no attention for, and one that drafts for it. Raises ConfigError."""
    dtype = weights_dtype(engine, model, is_cuda=True)
    _check_attention(engine, model, dtype)
    for each in drafting:
        try:
            _check_attention(engine, each, dtype)
        except ConfigError as error:
            raise ConfigError(f"speculative_config: the draft model: {error}") from error


def _check_attention(engine: EngineConfig, model: Attending, dtype: str) -> None:
    dims = {model.heads_of(layer).dim for layer in model.kv_layers}
    if model.latent is not None:
        model.latent.check_cuda(model.num_qo_heads // engine.tensor_parallel_size, engine.max_num_batched_tokens)
        dims = set()
    check_heads(sorted(dims), dtype, dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype)


def check_heads(dims: Iterable[int], dtype: str, pages_dtype: str) -> None:
    """Refuse heads that there are no kernels for. `dtype`: of what is computed. Raises ConfigError."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: GPUs attend in 16 bits, not in {dtype}; use bfloat16, or device cpu")
    for dim in dims:
        if dim not in _HEAD_DIMS:
            known = ", ".join(map(str, _HEAD_DIMS))
            raise ConfigError(f"device: GPUs attend with heads of {known} numbers, the model's have {dim}; use cpu")
        if dim == OLDER_HEAD_DIM and pages_dtype != dtype:
            raise ConfigError(f"kv_cache_dtype: GPUs attend with heads of {dim} numbers in 16 bits; use auto")
