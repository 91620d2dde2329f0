"""Accelerators as published, and what of the peak real engines reach. Dense figures, no sparsity.

Sources of the figures, by name:
    H100, H200    NVIDIA data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM): the tables give twice the
                  dense rate, "with sparsity"
    B200          NVIDIA data sheet "DGX B200" divided by eight: 1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity
    network       the same systems' data sheets: one 400 Gb/s ConnectX-7 port for each GPU
    host          the GPUs' data sheets: PCIe Gen5 x16, 128 GB/s in both directions together
    prices        RunPod's on-demand list, as quoted by deploybase.ai ("B200 vs H200 vs H100"), USD for a GPU-hour

What of a peak is reached is an assumption, the same for every policy that is compared:
    mfu           0.55 of the arithmetic, for prompts: large products reach about 0.7, the rest of a layer none of it
    mbu           0.7 of the memory's bandwidth, in decode steps: optimized stacks are said to reach 0.7 to 0.85, others
                  0.6 (open-source-ai.tech, "model bandwidth utilization")
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import ConfigError


@dataclass(slots=True, frozen=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_gb: float  # 10^9 bytes
    memory_tb_per_s: float
    bf16_tflops: float
    fp8_tflops: float
    network_gb_per_s: float  # bytes, of its own port: what a KV transfer between machines has
    nvlink_gb_per_s: float  # bytes in one direction, within a machine
    usd_per_hour: float
    host_gb_per_s: float = 64.0  # bytes in one direction, to and from host memory
    mfu: float = 0.55
    mbu: float = 0.7

    def flops(self, weight_bytes: float, mfu: float | None) -> float:
        """Operations per second that prompts reach; weights of one byte are computed in FP8. `mfu`: a model's own."""
        peak = self.fp8_tflops if weight_bytes <= 1 else self.bf16_tflops
        return peak * 1e12 * (self.mfu if mfu is None else mfu)

    @property
    def bytes_per_s(self) -> float:
        return self.memory_tb_per_s * 1e12 * self.mbu


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 80, 3.35, 989.5, 1979, 50, 450, 2.69),
        Gpu("H200", 141, 4.8, 989.5, 1979, 50, 450, 3.59),
        Gpu("B200", 180, 8.0, 2250, 4500, 50, 900, 5.98),
    )
}


def gpu_named(name: str) -> Gpu:
    try:
        return GPUS[name.upper()]
    except KeyError:
        raise ConfigError(f"gpu {name}: known are {', '.join(GPUS)}") from None
