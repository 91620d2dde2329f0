"""The choice, once when an engine starts, of what its rank computes on and with: device, weights' form, runner.

on CUDA                                                           CudaRunner
on a CPU, where there is C++ for the model and its compiler       NativeRunner, exact or not
else, exact results                                               TiledRunner
else                                                              TorchRunner
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import structlog
import torch
from torch import Tensor

from ..common.config import NO_DETERMINISTIC_CUDA, NO_INT8_LATENTS, CoreSlot, CpuIsa, EngineConfig
from ..common.cores import SharedCores, attach
from ..common.errors import ConfigError
from ..common.machine import free_memory_bytes
from ..models.adapter import NO_LORA_EXPERTS
from ..models.config import ModelConfig
from ..models.native import check_exact
from ..models.parts.chunks import check_chunks
from ..models.parts.gpu_attention import check_gpu, weights_dtype
from ..models.parts.states import check_states
from ..models.parts.uneven_heads import check_uneven
from .cpu.adapters import SlotMemory, StripFactors
from .cpu.compiler import NativeUnavailable
from .cpu.decoder import NativeDecoder
from .cpu.model import NativeModel
from .cpu.runner import NativeRunner
from .cpu.tiled import TiledRunner
from .nn.adapters import AdapterSlots
from .nn.attention.base import AttentionBackend, LayerPages, Scores
from .nn.attention.choose import make_attention
from .nn.attention.uneven import layers_of_pages
from .nn.decoder import Decoder
from .nn.expert_adapters import ExpertSlots, TorchFactors
from .nn.experts import SparseMLP
from .nn.loading import Progress, read_kv_scales
from .nn.runner import Runner
from .nn.torch_runner import TorchRunner
from .weights.float8 import has_products
from .weights.grouped import GroupedWeight
from .weights.weight import DenseWeight, Weight, is_slow_in_bfloat16, limit_prepared_products

if TYPE_CHECKING:
    from .nn.attention.device import DeviceAttention

log = structlog.get_logger(__name__)


def choose_device(config: EngineConfig, tp_rank: int) -> torch.device:
    """Raises ConfigError."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not has_cuda):
        return torch.device("cpu")
    if config.deterministic:
        raise ConfigError(NO_DETERMINISTIC_CUDA)
    if not has_cuda:
        raise ConfigError("device = cuda: torch finds no CUDA device; use --device cpu")
    if tp_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"tensor-parallel rank {tp_rank} has no device: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    return device


def check_kernels(config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what the device has no kernels for, before weights are loaded. Raises ConfigError."""
    check_uneven(model.uneven, config, is_cuda=device.type == "cuda")
    check_chunks(model.sliding_windows, config, is_cuda=device.type == "cuda")
    if model.states is not None:
        check_states(config, is_cuda=device.type == "cuda")
    if (quantization := model.quantization) is not None:
        quantization.check_float8(has_products=has_products(device), is_float32=dtype == torch.float32)
    if config.kv_cache_dtype == "int8" and model.latent is not None:
        raise ConfigError(NO_INT8_LATENTS)
    if device.type == "cuda":
        speculative = config.speculative_config
        path = None if speculative is None else speculative.model
        check_gpu(config, model, [] if path is None else [ModelConfig.from_dir(path)])


def choose_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """Return what the rank computes in; say where that is less than the checkpoint has."""
    name = weights_dtype(config, model, is_cuda=device.type == "cuda")
    if config.dtype == "auto" and model.dtype == "float32" != name:
        log.warning("dtype", stored="float32", computed=name, reason="attention on GPUs knows 16 bits alone")
    return getattr(torch, name)  # type: ignore[no-any-return]


@torch.inference_mode()
def make_adapters(
    config: EngineConfig, decoder: Decoder, native_model: NativeModel | None, device: torch.device
) -> AdapterSlots | None:
    """Make the slots that are asked for, in the form that products are made of. Raises ConfigError."""
    if not config.enable_lora:
        return None
    num_slots, max_rank = config.max_loras, config.max_lora_rank
    layers = [sparse for layer in decoder.layers if (sparse := layer.sparse) is not None]
    if device.type == "cuda":
        return _device_slots(config, decoder, layers, device)
    if native_model is None:
        slots = AdapterSlots(decoder, num_slots=num_slots, max_rank=max_rank, device=device)
        for block in layers:
            block.step = slots.step
        slots.experts = ExpertSlots(layers, TorchFactors(slots.step, num_slots, decoder.dtype), free_memory_bytes)
    else:
        memory = SlotMemory(native_model.library, num_slots, decoder.dtype)
        slots = AdapterSlots(native_model, num_slots=num_slots, max_rank=max_rank, device=device, make=memory.make)
        memory.allocate()
        native_model.adapt(slots, memory)
        form = StripFactors(memory, max_rank, native_model.point_to)
        slots.experts = ExpertSlots(layers, form, free_memory_bytes)
    return slots


def _device_slots(
    config: EngineConfig, decoder: Decoder, layers: Sequence[SparseMLP], device: torch.device
) -> AdapterSlots:
    from .cuda.adapters import DeviceSlots
    from .cuda.expert_adapters import DeviceFactors
    from .cuda.experts import GroupedExperts

    slots = DeviceSlots(decoder, num_slots=config.max_loras, max_rank=config.max_lora_rank, device=device)
    if not config.lora_experts:
        slots.experts = ExpertSlots(layers, refusal=NO_LORA_EXPERTS)
        return slots
    together = [block.grouped for block in layers if isinstance(block.grouped, GroupedExperts)]
    if len(together) < len(layers):
        raise ConfigError("lora_experts: this GPU computes the model's experts one by one; the log says why")
    slots.experts = ExpertSlots(layers, DeviceFactors(together, slots.rows, device), free_memory_bytes)
    return slots


@torch.inference_mode()
def pack_weights(decoder: Decoder, device: torch.device, *, native: bool, isa: CpuIsa) -> NativeModel | None:
    """Trade the loaded weights for the form in which this rank's runner reads them, on a CPU: C++'s, which is returned,
    or torch's. `native` False: no C++. Raises ConfigError for an instruction set that the processor lacks.
    """
    quantization = decoder.config.quantization
    if quantization is not None and quantization.is_float8:
        _narrow_float8(decoder, device)
    if quantization is not None and (quantization.has_mxfp4_experts or quantization.widened_experts):
        _tell_of_widened_experts(decoder, [*quantization.widened_experts] or ["MXFP4"])
    if device.type == "cuda":
        from .cuda.experts import group
        from .cuda.int4 import pack

        group(decoder, device)
        pack(decoder, device)
        torch.cuda.empty_cache()  # what was traded: the KV cache's size follows from what the card has free
    if device.type != "cpu":
        return None
    if native and (model := _native_model(decoder, isa)) is not None:
        return model
    if grouped := [linear.weight for linear in decoder.linears() if isinstance(linear.weight, GroupedWeight)]:
        log.warning(
            "quantized_weights",
            widened_to=str(decoder.dtype).removeprefix("torch."),
            memory_mib=_widened_mib(grouped, decoder.dtype),
            reason="no C++ for them",
        )
    limit_prepared_products()
    decoder.pack()
    return None


def _tell_of_widened_experts(decoder: Decoder, kinds: list[str]) -> None:
    """Say what experts take that a checkpoint has in fewer bits than this rank."""
    linears = [linear for linear in decoder.linears() if ".experts." in linear.name]
    dense = [linear.weight for linear in linears if isinstance(linear.weight, DenseWeight)]
    if dense:
        log.warning(
            "widened_experts",
            widened_from="+".join(kinds),
            widened_to=str(decoder.dtype).removeprefix("torch."),
            memory_mib=_widened_mib(dense, decoder.dtype),
            reason="no products of such blocks",
        )


def _widened_mib(weights: Sequence[Weight], dtype: torch.dtype) -> float:
    return round(sum(weight.num_outputs * weight.num_inputs for weight in weights) * dtype.itemsize / 2**20, 2)


def _narrow_float8(decoder: Decoder, device: torch.device) -> None:
    """Multiply in 8-bit floats where this rank's GPU does; say what is done."""
    from .cuda.float8 import narrow

    if device.type == "cuda" and (count := narrow(decoder, device)):
        log.info("quantized_weights", products="fp8", linears=count)
    elif not any(isinstance(linear.weight, GroupedWeight) for linear in decoder.linears()):
        log.info("quantized_weights", widened_to=str(decoder.dtype).removeprefix("torch."), reason="no products of FP8")


def choose_runner(
    config: EngineConfig,
    decoder: Decoder,
    native_model: NativeModel | None,  # as `pack_weights` made it of `decoder`
    pages: LayerPages,  # the model's part of what `kvcache.pages.allocate_pages` makes
    *,
    whole: Tensor,  # all of that
    cores: CoreSlot | None,
    progress: Progress | None = None,
) -> Runner:
    """Make this rank's runner; it compiles now what the first request would wait for. Raises ConfigError."""
    if (uneven := decoder.config.uneven) is not None:
        pages = layers_of_pages(pages, uneven)
    attention = _attention(config, decoder, pages)
    if whole.device.type == "cuda":
        return _cuda_runner(config, decoder, attention, whole, progress)
    if native_model is not None:
        native = NativeDecoder(
            native_model,
            pages,
            num_threads=config.num_threads or torch.get_num_threads(),
            cores=_shared_cores(cores),
            is_exact=config.is_exact_on("cpu"),
            states=decoder.states,
        )
        num_pages, ends = decoder.config.num_kv_pages, decoder.config.eos_token_ids
        return NativeRunner(native, decoder.final_norm, num_pages=num_pages, eos_token_ids=ends)
    is_exact = config.is_exact_on("cpu")
    if is_exact:
        check_exact(decoder.config, ["the log says why"])
    with torch.inference_mode():
        make = TiledRunner if is_exact else TorchRunner
        return make(decoder, attention, block_size=config.block_tokens)


def _attention(config: EngineConfig, decoder: Decoder, pages: LayerPages) -> AttentionBackend:
    model = decoder.config
    has_scales = pages[0].dtype == torch.float8_e4m3fn and config.load_format != "dummy"
    return make_attention(
        config.attention_backend,
        pages,
        model.num_qo_heads // decoder.head.rows.comm.size,
        model.kv_windows,
        query_dtype=decoder.dtype,
        kv_scales=_kv_scales(config, model) if has_scales else None,
        deterministic=config.is_exact_on(pages[0].device.type),
        is_wide=decoder.dtype == torch.bfloat16 and is_slow_in_bfloat16(),
        scores=Scores(
            scale=model.score_scale,
            cap=model.score_cap,
            sinks=decoder.sinks(),
            value_dim=None if model.latent is None else model.latent.kv_rank,
        ),
    )


def _kv_scales(config: EngineConfig, model: ModelConfig) -> list[tuple[float, float]]:
    """Return k_scale and v_scale of each layer that keeps keys and values."""
    scales = read_kv_scales(config.model_dir, model.num_layers)
    return [scales[layer] for layer in model.kv_layers]


def _cuda_runner(
    config: EngineConfig, decoder: Decoder, attention: AttentionBackend, pages: Tensor, progress: Progress | None
) -> Runner:
    from .cuda.runner import CudaRunner

    with torch.inference_mode():
        return CudaRunner(config, decoder, cast("DeviceAttention", attention), pages, progress)


def _native_model(decoder: Decoder, isa: CpuIsa) -> NativeModel | None:
    """Return None where the model is not for C++ and, with a line in the log, where this machine or a block is not."""
    from ..models.default import cache_dir

    try:
        model = NativeModel(decoder, cache_dir(), isa)
    except NativeUnavailable as reason:
        log.warning("cpu_kernels", used=False, reason=str(reason))
        return None
    log.info("cpu_kernels", used=True, library=model.name)
    return model


def _shared_cores(slot: CoreSlot | None) -> SharedCores | None:
    if slot is None:
        return None
    try:
        return attach(slot)
    except OSError as error:
        log.warning("shared_cores", used=False, reason=f"{slot.path}: {error.strerror}")
        return None
