"""Everything that an operator can set: flags, environment variables and YAML keys of kvferry, declared once.

A field is a YAML key; `KVFERRY_` + upper case is its environment variable; `--` + dashes is its flag, where a
command has one. Each group of `--help` has a file beside this one. A pool's own values stand under `prefill:` and
`decode:`. One file serves every command of a cluster: each takes what concerns it. Where a value came from and how
layers are merged is `load`'s business.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from .adapters import AdapterSettings
from .batches import BatchSettings
from .cluster import ClusterSettings
from .engine import EngineSettings
from .http import HttpSettings
from .model import ModelSettings
from .objectives import ObjectiveSettings
from .option import Option
from .output import OutputSettings
from .pools import PoolSettings, PoolsSettings
from .values import MAX_PORT

ENV_PREFIX = "KVFERRY_"


class ServeSettings(
    OutputSettings,
    ClusterSettings,
    AdapterSettings,
    EngineSettings,
    ObjectiveSettings,
    PoolsSettings,
    BatchSettings,
    HttpSettings,
    ModelSettings,
):
    """All settings of a deployment, checked against each other; `--help` shows the last group first."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._check_keys()
        self._check_pools()
        self._check_steps()
        self._check_classes()
        self._check_forms_of_weights()
        self._check_deterministic()
        self._check_adapters()
        if self.ray_address is not None and self.launcher != "ray":
            raise ValueError("ray_address: only with --launcher ray")
        if self.admin_port and self.admin_port + self.routers - 1 > MAX_PORT:
            raise ValueError(f"admin_port: each router has one, and {self.routers} from here on are beyond {MAX_PORT}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError("max_model_len: must hold a prompt token and an answer token, so at least 2")
        return self

    @property
    def is_exact(self) -> bool:
        """Tell whether workers have exact results, where `device` says enough of what they run on."""
        return self.deterministic or (self.speculative_config is not None and self.device != "cuda")

    @property
    def giving_way(self) -> set[str]:
        """Name the settings whose defaults others overrule: given as they are, they would be refused."""
        pool, num_tokens = self.decode, self.decode.max_num_batched_tokens or self.max_num_batched_tokens
        overruled = {
            "deterministic": self.is_exact and not self.deterministic,
            "max_num_seqs": not pool.max_num_seqs and num_tokens is not None and num_tokens < self.max_num_seqs,
        }
        return {name for name, is_so in overruled.items() if is_so}

    def _check_keys(self) -> None:
        for name, keys in (("api_key", self.api_key), ("admin_key", self.admin_key)):
            if any("," in key or key != key.strip() or not key for key in keys):
                raise ValueError(f"{name}: a key has at least one character, no comma and no space around it")

    def _check_pools(self) -> None:
        for name, pool in (("prefill", self.prefill), ("decode", self.decode)):
            low, high = pool.min_workers or 0, pool.workers if pool.max_workers is None else pool.max_workers
            if not low <= pool.workers <= high:
                broken = "min_workers" if low > pool.workers else "max_workers"
                raise ValueError(
                    f"{name}.{broken}: the pool's {pool.workers} workers are not between its min_workers {low} and its "
                    f"max_workers {high}"
                )
        if self.decode.min_workers == 0:
            raise ValueError("decode.min_workers: at least one decode worker is needed; give --decode-min 1")
        if self.decode.workers < 1:
            raise ValueError("decode: at least one decode worker is needed; for one pool that does both: --prefill 0")
        if self.prefill.workers == 0 and not self.local_prefill:
            raise ValueError("local_prefill: without prefill workers every prompt is local; give --prefill 1")

    def _check_steps(self) -> None:
        """Check that a decode step has a token for each sequence. A number that was not given follows the other one."""
        pool, own = self.decode, self.decode.max_num_batched_tokens
        num_tokens = own or self.max_num_batched_tokens
        num_rows = pool.max_num_seqs or (self.max_num_seqs if "max_num_seqs" in self.model_fields_set else 1)
        if num_tokens is not None and num_tokens < num_rows:
            raise ValueError(
                f"{'' if own is None else 'decode.'}max_num_batched_tokens: must be at least max_num_seqs, which is "
                f"{num_rows}: each of the sequences has a token in a step"
            )

    def _check_classes(self) -> None:
        names = [known.name for known in self.classes]
        if "default" in names:
            raise ValueError("classes: 'default' is what the other settings of objectives describe")
        if len(set(names)) < len(names):
            raise ValueError("classes: each name once")

    def _check_forms_of_weights(self) -> None:
        forms = [pool.quantization or self.quantization or "plain" for pool in (self.prefill, self.decode)]
        if self.prefill.workers and forms[0] != forms[1] and not set(forms) <= set(self.mixed_quantization):
            given = "decode" if self.decode.quantization is not None else "prefill"
            raise ValueError(
                f"{given}.quantization: prefill workers have {forms[0]} weights, decode workers {forms[1]}: they "
                f"compute other numbers; where that is accepted, give --mixed-quantization {forms[0]},{forms[1]}"
            )
        if self.mixed_quantization and self.is_exact:
            raise ValueError("mixed_quantization: not with deterministic: equal requests would have other answers")

    def _check_deterministic(self) -> None:
        pools = (self.prefill, self.decode)
        sizes = [pool.tensor_parallel_size or self.tensor_parallel_size for pool in pools]
        splits = {
            self.enable_expert_parallel if pool.enable_expert_parallel is None else pool.enable_expert_parallel
            for pool in pools
        }
        plans = {pool.expert_plan or self.expert_plan for pool in pools}
        exchanges = {pool.expert_exchange or self.expert_exchange for pool in pools}
        hint = "" if self.deterministic else "; drafts on CPUs ask for it, on GPUs give --device cuda"
        if self.is_exact and self.prefill.workers and sizes[0] != sizes[1]:
            raise ValueError(
                f"deterministic: both pools need the same tensor_parallel_size, these have {sizes[0]} and {sizes[1]}: "
                f"sums over ranks are rounded as they are split{hint}"
            )
        named: dict[str, set[Any]] = {
            "enable_expert_parallel": splits,
            "expert_plan": plans,
            "expert_exchange": exchanges,
        }
        unlike = [name for name, values in named.items() if len(values) > 1]
        if self.is_exact and self.prefill.workers and max(sizes) > 1 and unlike:
            raise ValueError(f"deterministic: both pools need the same {unlike[0]}: sums are rounded as split{hint}")
        is_refused = "deterministic" in self.model_fields_set and not self.deterministic
        if is_refused and self.is_exact:
            raise ValueError("speculative_config: on CPUs it needs deterministic, which is turned off: leave that away")

    def _check_adapters(self) -> None:
        for name, is_given in (
            ("lora_modules", self.lora_modules),
            ("allow_runtime_lora_updating", self.allow_runtime_lora_updating),
            ("lora_experts", self.lora_experts),
        ):
            if is_given and not self.enable_lora:
                raise ValueError(f"{name}: needs enable_lora")
        if self.allow_runtime_lora_updating and self.routers > 1:
            raise ValueError("allow_runtime_lora_updating: with one router; of several only the asked one would know")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras: at least max_loras, which is {self.max_loras}")


def option_of(field_name: str) -> Option:
    """Return the `Option` that a field of ServeSettings carries."""
    return next(item for item in ServeSettings.model_fields[field_name].metadata if isinstance(item, Option))


def setting_keys() -> dict[str, str]:
    """Name (in flags and environment) to dotted key (in YAML): `prefill_max_num_seqs` to `prefill.max_num_seqs`."""
    keys: dict[str, str] = {}
    for name in ServeSettings.model_fields:
        if name in ("prefill", "decode"):
            keys[name] = f"{name}.workers"
            keys |= {f"{name}_{own}": f"{name}.{own}" for own in PoolSettings.model_fields if own != "workers"}
        else:
            keys[name] = name
    return keys
