"""Stand-ins for the functions of flashinfer-python 0.7.2 that the product calls: the same signatures, in torch.

What the real package does on the host is done here too: which arrays it uploads and when, what it keeps between `plan`
and `run`, what it refuses. Its kernels' checks of layout and type are errors; then torch computes.
"""

from . import activation, mla, norm, rope, sampling
from .attention import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from .mla import BatchMLAPagedAttentionWrapper
from .page import append_paged_kv_cache, append_paged_mla_kv_cache

__version__ = "0.7.2"
__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "activation",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "mla",
    "norm",
    "rope",
    "sampling",
]
