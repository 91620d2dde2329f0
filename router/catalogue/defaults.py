"""The model's authors recommend values where a client gives none: generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import ConfigError
from ...models.stored.json_files import read_json


@dataclass(slots=True, frozen=True)
class SamplingDefaults:
    """The defaults of fields that a client may leave out; OpenAI's own where the file says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dir(cls, model_dir: Path) -> SamplingDefaults:
        path = model_dir / "generation_config.json"
        found: dict[str, Any] = read_json(path, default={})
        try:
            values = {name: float(found[name]) for name in cls.__slots__ if found.get(name) is not None}
            top_k = max(int(values.pop("top_k", 0)), 0)
            return cls(top_k=top_k, **values)
        except (ValueError, TypeError, OverflowError) as error:
            raise ConfigError(f"{path} is not a generation config: {error}") from error
