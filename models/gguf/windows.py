"""Windows of a GGUF file's layers, as config.json has them."""

from __future__ import annotations

from .model_file import Json, ModelFile

# Of layers, the last of which sees everything.
_PERIODS = {
    **dict.fromkeys(("cohere2", "exaone4", "exaone-moe", "llama4", "olmo2"), 4),
    "gemma2": 2,
    "gemma3": 6,
    "gpt-oss": 2,
}


def windows(file: ModelFile) -> Json:
    """Return the window, and which layers have it: each of a list, or all but the last of each period."""
    fields, num_layers = file.fields, file.config["num_hidden_layers"]
    window = file.integer("attention.sliding_window", 0)
    pattern = fields.find(fields.of_model("attention.sliding_window_pattern"))
    if pattern is None:
        pattern = _PERIODS[fields.architecture]
    if isinstance(pattern, int):
        pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise ValueError(f"attention.sliding_window_pattern = {pattern!r} does not fit {num_layers} layers")
    kinds = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]
    return {"sliding_window": window or None, "layer_types": kinds}
