"""Accelerators as published, and what of the peak real engines reach. Dense figures, no sparsity.

Sources of the figures, by name:
    H100, H200    NVIDIA data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM): the tables give twice the
                  dense rate, "with sparsity"
    B200          NVIDIA data sheet "DGX B200" divided by eight: 1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity
    A100          NVIDIA data sheet "A100 Tensor Core GPU" (SXM), 40 and 80 GB; no FP8
    L40S, L4      NVIDIA data sheets "L40S" and "L4": BF16 without sparsity; no NVLink: PCIe Gen4 x16
    INT8          the same sheets, without sparsity: about twice BF16's rate; B200's as its FP8's
    MI300X        AMD data sheet "Instinct MI300X": seven Infinity Fabric links of 128 GB/s in both directions together
    network       the same systems' data sheets: one port for each GPU, ConnectX-7 of 400 Gb/s in a DGX H100, H200
                  and B200, 200 Gb/s in a DGX A100; cards without a system of their own: none
    host          the GPUs' data sheets: PCIe Gen5 x16, 128 GB/s in both directions together, Gen4 half of it
    prices        RunPod's on-demand list, as quoted by deploybase.ai ("B200 vs H200 vs H100"), USD for a GPU-hour;
                  the others have none here

What of a peak is reached is an assumption, the same for every policy that is compared:
    mfu           0.55 of the arithmetic, for prompts: large products reach about 0.7, the rest of a layer none of it
    mbu           0.7 of the memory's bandwidth, in decode steps: optimized stacks are said to reach 0.7 to 0.85, others
                  0.6 (open-source-ai.tech, "model bandwidth utilization")
    nibble_share  0.62 of that where weights are nibbles, and once more for each 16 rows: gpt-fast's README has 863 GB/s
                  on an A100 in 4 bits, 1,397 plain; int4mm.cu of torch reads them for each 16 rows
    layer_s       30 us of a layer's kernels beside its products and reads, and sum_s 10 us of a sum over ranks however
                  short: less is what fused kernels reach, more what an engine without CUDA graphs takes

A CPU stands here too, by rates that were measured on it (`measured`): of those it reaches all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..common.errors import ConfigError
from .cpu_rates import CpuRates


@dataclass(slots=True, frozen=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_gb: float  # 10^9 bytes
    memory_tb_per_s: float
    bf16_tflops: float
    fp8_tflops: float | None  # None: this engine has no products of FP8 there
    network_gb_per_s: float | None  # bytes, of its own port: what a KV transfer between machines has
    nvlink_gb_per_s: float  # bytes in one direction, to others of its machine
    usd_per_hour: float | None
    host_gb_per_s: float = 64.0  # bytes in one direction, to and from host memory
    mfu: float = 0.55
    mbu: float = 0.7
    nibble_share: float = 0.62
    nibble_rows: int = 16  # 0: all at once, and none are widened
    layer_s: float = 30e-6
    sum_s: float = 10e-6
    attention_share: float = 1.0  # of the products' rate that a prompt's attention reaches
    is_cpu: bool = False
    groups_float8: bool = False  # rows are multiplied by many experts in FP8 at once
    int8_tflops: float | None = None  # None: as in bfloat16
    rates: CpuRates | None = None  # of a CPU: measured apart; None: by the two rates above

    def flops(self, mfu: float | None = None, *, float8: bool = False, int8: bool = False) -> float:
        """Operations per second that prompts reach. `mfu`: a model's own; by weights of FP8, or integers."""
        narrow = self.fp8_tflops if float8 else self.int8_tflops if int8 else None
        peak = self.bf16_tflops if narrow is None else narrow
        return peak * 1e12 * (self.mfu if mfu is None else mfu)

    @property
    def bytes_per_s(self) -> float:
        return self.memory_tb_per_s * 1e12 * self.mbu

    @property
    def at_peak(self) -> Gpu:
        """Return one that reaches its peaks and starts kernels in no time: what nothing can be faster than."""
        return replace(self, mfu=1.0, mbu=1.0, nibble_share=1.0, nibble_rows=0, layer_s=0.0, sum_s=0.0, rates=None)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 80, 3.35, 989.5, 1979, 50, 450, 2.69, groups_float8=True, int8_tflops=1979),
        Gpu("H200", 141, 4.8, 989.5, 1979, 50, 450, 3.59, groups_float8=True, int8_tflops=1979),
        Gpu("B200", 180, 8.0, 2250, 4500, 50, 900, 5.98, int8_tflops=4500),
        Gpu("A100-80GB", 80, 2.039, 312, None, 25, 300, None, host_gb_per_s=32.0, int8_tflops=624),
        Gpu("A100-40GB", 40, 1.555, 312, None, 25, 300, None, host_gb_per_s=32.0, int8_tflops=624),
        Gpu("L40S", 48, 0.864, 362, None, None, 32, None, host_gb_per_s=32.0, int8_tflops=733),
        Gpu("L4", 24, 0.300, 121, None, None, 32, None, host_gb_per_s=32.0, int8_tflops=242),
        Gpu("MI300X", 192, 5.3, 1307.4, None, None, 448, None, int8_tflops=2614.9),
    )
}
CPU = "cpu"
_CPU_ATTENTION = 0.8  # of the products' rate: keys and values are packed first (native/attention/prompt_attention.hpp)


def gpu_named(name: str) -> Gpu:
    try:
        return GPUS[name.upper()]
    except KeyError:
        raise ConfigError(f"gpu {name}: known are {', '.join(GPUS)}") from None


def probed_cpu(memory_gb: float, rates: CpuRates) -> Gpu:
    """Return this machine's CPU by the rates of each part of a step."""
    cpu = measured_cpu(memory_gb, rates.bytes_per_s / 1e9, rates.flops_per_s / 1e12)
    return replace(cpu, rates=rates)


def measured_cpu(memory_gb: float, memory_gb_per_s: float, tflops: float) -> Gpu:
    """Return this machine's CPU by what was measured on it: reading memory, and products in bfloat16."""
    return Gpu(
        CPU,
        memory_gb,
        memory_gb_per_s / 1e3,
        tflops,
        None,
        None,
        memory_gb_per_s,
        None,
        mfu=1.0,
        mbu=1.0,
        layer_s=0.0,
        sum_s=0.0,
        attention_share=_CPU_ATTENTION,
        is_cpu=True,
    )
