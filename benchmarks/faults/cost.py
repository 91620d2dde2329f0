"""What safety costs on a healthy run: the same build with and without checksums and grant signatures.

Two deployments run side by side and answer the same requests in turns, so that whatever the machine does meanwhile is
done to both. The bare one is started by `bare.py`, which takes the signatures out.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.prompts import PromptSource

_VOCAB = 4096
_OUTPUT_LEN = 32
_WARM_UPS = 3


@dataclass(slots=True, frozen=True)
class CostResult:
    """Medians over the requests of one prompt length; a ratio is the median of the pairs' ratios."""

    input_len: int
    num_pairs: int
    ttft_ms: tuple[float, float]  # safe, bare
    tpot_ms: tuple[float, float]
    ttft_ratio: float
    tpot_ratio: float


async def measure_cost(safe: System, bare: System, *, input_len: int, num_pairs: int, seed: int) -> CostResult:
    endpoints = [
        Endpoint(system.base_url, model=system.model, ignore_eos=True, temperature=0.0) for system in (safe, bare)
    ]
    prompts = PromptSource(seed, _VOCAB)
    pairs: list[tuple[RequestRecord, RequestRecord]] = []
    try:
        for number in range(_WARM_UPS + num_pairs):
            prompt = prompts.make(input_len)
            order = (0, 1) if number % 2 else (1, 0)
            records = {which: await endpoints[which].send(prompt, _OUTPUT_LEN) for which in order}
            for record in records.values():
                if not record.is_ok:
                    raise ConfigError(f"a request failed: {record.error}")
            if number >= _WARM_UPS:
                pairs.append((records[0], records[1]))
    finally:
        for endpoint in endpoints:
            endpoint.close()
    ttft = [(a.ttft_s or 0.0, b.ttft_s or 0.0) for a, b in pairs]
    tpot = [(a.tpot_s or 0.0, b.tpot_s or 0.0) for a, b in pairs]
    return CostResult(
        input_len,
        num_pairs,
        (median(a for a, _ in ttft) * 1e3, median(b for _, b in ttft) * 1e3),
        (median(a for a, _ in tpot) * 1e3, median(b for _, b in tpot) * 1e3),
        median(a / b for a, b in ttft),
        median(a / b for a, b in tpot),
    )
