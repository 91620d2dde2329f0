"""Messages as lines of a trace: the same for the same seed, so without nonces."""

from __future__ import annotations

import msgspec

from kvferry.wire.fields import Message


def brief(message: Message) -> str:
    """One line for the trace: no nonces, no pages."""
    fields = []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name in ("mac", "open_id", "grant", "spec", "version", "transport", "opens", "fetch_id", "hashes"):
            if name == "spec" and hasattr(value, "request_id"):
                fields.append(f"{value.request_id}.{value.attempt} {value.choices}")
            elif name == "grant":
                fields.append(f"epoch {value.grant_id.epoch} blocks {value.block_ids}")
            continue
        text = msgspec.json.encode(value).decode() if isinstance(value, msgspec.Struct | tuple) else str(value)
        fields.append(f"{name}={text}")
    return f"{type(message).__name__} {' '.join(fields)}"
