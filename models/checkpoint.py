"""A checkpoint's files before a byte of weights is read: which tensors it must have, and whether they are all there."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..common.errors import ConfigError
from .config import ModelConfig
from .families.module_names import full_name
from .families.nested import NESTED
from .heads import with_embedding
from .parts.expert_stacks import StackPart
from .parts.uneven_heads import made_parts
from .quantization import Quantization, untold_quantization
from .storage import BYTES, FLOATS, MXFP4_GROUP, NO_SHARED_ACT_ORDER, Shape, Storage, Types, WantedTensor
from .stored.safetensors import read_header, safetensors_files

# Of a cache in 8 bits, as quantising tools name them: a key is stored as key / k_scale, or as what k_proj yields.
KV_SCALE = re.compile(
    r"model\.layers\.(\d+)\.(?:self_attn|mixer)\.(?:attn\.|[kv]_proj\.)?([kv])_(?:scale|proj\.output_scale)"
)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Further layers, that predict further tokens, where they are not numbered with the others: EXAONE's, and ERNIE's.
_DRAFT = ("mtp.", "model.mtp_")
# The other parts, which see or hear; nothing of them is read.
_SEEING = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in (
        *("vision_tower", "vision_model", "multi_modal_projector", "visual"),
        *("audio_tower", "embed_vision", "embed_audio"),
    )
)

_WHOLE_NUMBERS = {"I32": "i", "I64": "q"}  # by their codes in an array


class StoredTensor(NamedTuple):
    """Says what a tensor of a checkpoint is."""

    shape: Shape
    type: str  # of its numbers, as safetensors' headers name it


def check_checkpoint(model_dir: Path, config: ModelConfig) -> None:
    """Refuse a checkpoint that no worker could load: tensors missing, unknown or of another shape, files cut short.

    Raises ConfigError.
    """
    found: dict[str, StoredTensor] = {}
    for path in safetensors_files(model_dir):
        found |= _read_tensors(path)
    for name, parts in expert_parts(config, {name: tensor.shape for name, tensor in found.items()}).items():
        stack = found.pop(name)
        found |= {part.name: StoredTensor(part.shape, stack.type) for part in parts}
    found = with_embedding(found, is_tied=config.tie_embeddings)
    wanted, optional = stored_tensors(config.quantization, tensor_shapes(config))
    check_names(set(wanted), set(found) - optional, model_dir, config)
    for name, tensor in wanted.items():
        check_tensor(name, found[name], tensor)


def expert_parts(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, list[StackPart]]:
    """Return, of each tensor that stands for all experts of a layer, what each of these has of it.

    `shapes`: of all tensors of a checkpoint. Raises ConfigError where experts cannot be told apart in one.
    """
    experts, quantization = config.experts, config.quantization
    if experts is None:
        return {}
    block_of = (lambda module: None) if quantization is None else quantization.block_of
    return experts.parts_in(shapes, config.hidden_size, block_of)


def check_act_order(model_dir: Path, quantization: Quantization | None, modules: Iterable[str]) -> None:
    """Refuse weights in act-order of modules whose inputs are shared by ranks, before any weight is read.

    What says of each input which group it is of is read, and is small: inputs may stand in order in spite of
    config.json. Nothing is read where that tells of no act-order. Raises ConfigError.
    """
    if quantization is None or not quantization.is_ordered:
        return
    stored = ((module, quantization.storage(module)) for module in modules)
    indices = ((own.group_index(module), module) for module, own in stored if own is not None)
    names = {index: module for index, module in indices if index is not None}
    for path in safetensors_files(model_dir) if names else ():
        for name, entry in read_header(path).entries.items():
            code = _WHOLE_NUMBERS.get(entry.dtype)
            if (module := names.get(full_name(name))) is None or code is None:
                continue
            try:
                with path.open("rb") as file:
                    file.seek(entry.begin)
                    groups = array(code, file.read(entry.end - entry.begin)).tolist()
            except (OSError, ValueError, MemoryError) as error:
                raise ConfigError(f"{path} cannot be read: {name}: {error!r}") from error
            if groups != sorted(groups):
                raise ConfigError(f"{model_dir}: {module}: {NO_SHARED_ACT_ORDER}")


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return every tensor of the whole model in plain numbers: its name in a checkpoint, its shape by config.json."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        f"model.{config.family.final_norm}.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.layer_inputs is not None:
        shapes |= config.layer_inputs.shapes(config.num_layers, hidden)
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in config.norm_names(layer) if norm is not None}
        if config.family.has_layer_factors:
            shapes[f"{name}.layer_scalar"] = (1,)
        if config.has_mixer(layer):
            shapes |= _mixer_shapes(config, name, layer)
        if (experts := config.experts_of(layer)) is not None and config.has_feed_forward(layer):
            shapes |= experts.shapes(name, hidden)
        if config.has_mlp(layer):
            shapes |= _mlp_shapes(config, name, layer)
    return shapes


def stored_tensors(
    quantization: Quantization | None, plain: Mapping[str, Shape]
) -> tuple[dict[str, WantedTensor], set[str]]:
    """Return the tensors that a checkpoint must have, and the names of those that it may have besides.

    `plain` are those that it would have in plain numbers. Raises ConfigError where groups do not fit.
    """
    required: dict[str, WantedTensor] = {}
    optional: set[str] = set()
    for name, shape in plain.items():
        storage, module = matrix_storage(quantization, name, shape), name.removesuffix(".weight")
        if quantization is not None and quantization.has_mxfp4_experts and len(shape) == 3:
            groups = (shape[0], shape[2], shape[1] // MXFP4_GROUP)  # experts' matrices alone have three dimensions
            required[f"{name}_blocks"] = WantedTensor((*groups, MXFP4_GROUP // 2), BYTES)
            required[f"{name}_scales"] = WantedTensor(groups, BYTES)
        elif storage is None:
            required[name] = WantedTensor(shape)
        else:
            required |= storage.tensors(module, shape[0], shape[1])
            optional.update(storage.optional_tensors(module, shape[0], shape[1]))  # `|=` of keys copies the set
    return required, optional - required.keys()


def matrix_storage(quantization: Quantization | None, name: str, shape: Shape) -> Storage | None:
    """Return how the checkpoint has what would be the tensor `name` of a plain one; None: as it is."""
    if quantization is None or len(shape) != 2 or not name.endswith(".weight"):
        return None
    storage = quantization.storage(name.removesuffix(".weight"))
    return None if storage is None or storage.layout == "plain" else storage


def _mixer_shapes(config: ModelConfig, name: str, layer: int) -> dict[str, Shape]:
    attention = f"{name}.{config.family.attention}"
    shapes: dict[str, Shape] = {}
    if config.states is not None and config.has_state(layer):
        shapes = config.states.shapes(f"{name}.{config.states.module}", config.hidden_size)
    if config.page_of(layer) is None:
        return shapes
    if config.latent is None:
        return shapes | _attention_shapes(config, attention, layer)
    return config.latent.shapes(attention, config.hidden_size, config.num_qo_heads)


def _attention_shapes(config: ModelConfig, name: str, layer: int) -> dict[str, Shape]:
    hidden, family, (num_kv, dim) = config.hidden_size, config.family, config.heads_of(layer)
    heads, kv_heads = config.num_qo_heads * dim, num_kv * dim
    sizes = {f"{part}_proj": heads if part == "q" else kv_heads for part in made_parts(config.uneven, layer)}
    if family.has_attention_gates:
        sizes["q_proj"] *= 2
    if family.fusion == "all":
        sizes = {"qkv_proj": sum(sizes.values())}
    shapes: dict[str, Shape] = {}
    for part, size in sizes.items():
        shapes |= _linear(f"{name}.{part}", size, hidden, bias=config.qkv_bias)
    shapes |= _linear(f"{name}.{family.output_name}", hidden, heads, bias=config.o_bias)
    if config.qk_norm:
        is_whole = family.head_norms == "whole"
        num_normed = 1 if made_parts(config.uneven, layer) == "q" else 2
        for norm, size in list(zip(family.head_norm_names, (heads, kv_heads), strict=True))[:num_normed]:
            shapes[f"{name}.{norm}.weight"] = (size if is_whole else dim,)
    if family.has_sinks:
        shapes[f"{name}.sinks"] = (config.num_qo_heads,)
    return shapes


def _mlp_shapes(config: ModelConfig, name: str, layer: int) -> dict[str, Shape]:
    hidden, size, names = config.hidden_size, config.inner_size(layer), config.family.mlp
    name = f"{name}.{names.module}"
    *parts, down = names.parts
    sizes = {names.fused: 2 * size} if config.family.fusion != "none" else dict.fromkeys(parts, size)
    shapes: dict[str, Shape] = {}
    for part, outputs in sizes.items():
        shapes |= _linear(f"{name}.{part}", outputs, hidden, bias=config.mlp_bias)
    return shapes | _linear(f"{name}.{down}", hidden, size, bias=config.mlp_bias)


def _linear(name: str, size_out: int, size_in: int, *, bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (size_out, size_in)}
    return weight | {f"{name}.bias": (size_out,)} if bias else weight


def check_names(wanted: set[str], found: set[str], model_dir: Path, config: ModelConfig) -> None:
    """Refuse a checkpoint that lacks a tensor of the model, or has one that is none of it. Raises ConfigError."""
    missing = sorted(wanted - found)
    extra = sorted(
        name
        for name in found - wanted
        if not name.endswith("rotary_emb.inv_freq")
        and not (config.tie_embeddings and name == "lm_head.weight")  # the embedding's matrix again (heads.py)
        and not (config.architecture in NESTED and name.startswith(_SEEING))
        and not KV_SCALE.fullmatch(name)
        and not _is_of_draft(name, config)
        and not _is_of_borrower(name, config)
    )
    untold = untold_quantization(extra) if config.quantization is None else ""
    if missing:
        raise ConfigError(f"{model_dir}: {len(missing)} tensors are missing: {_some(missing)}{untold}")
    if extra:
        raise ConfigError(f"{model_dir}: {len(extra)} tensors are unknown to this architecture: {_some(extra)}{untold}")


def _is_of_draft(name: str, config: ModelConfig) -> bool:
    match = _LAYER.match(name)
    if name.startswith(_DRAFT):
        return True
    return match is not None and 0 <= int(match[1]) - config.num_layers < config.num_draft_layers


def _is_of_borrower(name: str, config: ModelConfig) -> bool:
    """Tell whether a tensor would make keys or values of a layer that reads another one's: published ones have some."""
    match = _LAYER.match(name)
    if match is None or config.uneven is None or not config.uneven.borrows(int(match[1])):
        return False
    return name.endswith(tuple(f".self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm", "v_norm")))


def check_tensor(name: str, found: StoredTensor, wanted: WantedTensor) -> None:
    """Raises ConfigError. A scale for a whole tensor, or each output, may stand in any number of dimensions."""
    is_exact = name.endswith((".weight", ".bias"))
    if found.shape != wanted.shape and (is_exact or _without_ones(found.shape) != _without_ones(wanted.shape)):
        raise ConfigError(f"tensor {name} has shape {list(found.shape)}, config.json implies {list(wanted.shape)}")
    if found.type not in wanted.types:
        raise ConfigError(f"tensor {name} holds {found.type}, config.json implies {_told(wanted.types)}")


def _told(types: Types) -> str:
    if not set(FLOATS) <= set(types):
        return " or ".join(types)
    return " or ".join(["floats", *(each for each in types if each not in FLOATS)])


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return what a file's header tells of its tensors."""
    header = read_header(path)
    ranges = sorted((entry.begin, entry.end, name) for name, entry in header.entries.items())
    end = max((last for _, last, _ in ranges), default=header.end)
    if (size := path.stat().st_size) != end:
        raise ConfigError(f"{path} has {size} bytes where its header tells of {end}: it was cut short, or damaged")
    for (_, last, _), (first, _, name) in pairwise([(0, header.end, ""), *ranges]):
        if first != last:
            text = f"{path}: the bytes of {name} begin at {first}, and those before them end at {last}"
            raise ConfigError(f"{text}: no library reads such a file; save it anew, or copy it again")
    return {full_name(name): StoredTensor(entry.shape, entry.dtype) for name, entry in header.entries.items()}
