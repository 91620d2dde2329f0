"""What the goodput comparison is about, fixed before any policy was tuned to it.

model, hardware      Llama 3.1 70B in bfloat16 on H100 SXM GPUs, four to a worker
fleet                eight workers (32 GPUs); every split of them into prefill and decode for each baseline
colocated            eight workers that do both, chunks of 256, 512 or 2,048 tokens, whichever does best
objectives           TTFT <= max(1 s, 3 x the prompt's unloaded TTFT), TPOT <= 50 ms, both met by 90 % of requests
goodput              the highest rate at which that holds, in requests per second
load levels          50, 80 and 100 % of the best baseline's goodput
traces               arrivals scaled in time to the rate, lengths and prefixes as recorded
tuning               on the first half of each trace; what is shown is the second half
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class GoodputSetup:
    """Everything that a comparison holds fixed."""

    model: str = "llama-3.1-70b"
    gpu: str = "h100"
    tensor_parallel_size: int = 4
    num_workers: int = 8
    colocated_chunks: tuple[int, ...] = (256, 512, 2048)
    ttft_s: float = 1.0
    ttft_stretch: float = 3.0
    tpot_s: float = 0.05
    share: float = 0.9  # of requests that must meet both
    levels: tuple[float, ...] = (0.5, 0.8, 1.0)
    traces: tuple[str, ...] = ("mooncake-conversation", "azure-2023-conv", "azure-2023-code")
    baselines: tuple[str, ...] = ("colocated", "round_robin", "least_loaded", "kv_cost")
    policy: str = "slo"
    seed: int = 0


SETUP = GoodputSetup()
