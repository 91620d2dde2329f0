"""Block counts and prefix overlap, pools apart: the published formula of NVIDIA Dynamo's router. A baseline.

    cost = scale x max(prefill blocks under way + the prompt's blocks - overlap, 0) + decode blocks

The least cost wins (temperature 0). Blocks of the prefix that lie in device memory count 1, those in host memory and
on disk less; the stage that decodes gives no credit for overlap and counts no prompts. Defaults and both rules:
ai-dynamo/dynamo, docs/components/router/router-concepts.md and router-disaggregated-serving.md.
"""

from __future__ import annotations

from ..state.demand import Demand
from ..state.views import WorkerView
from .least_loaded import Key, LeastLoaded

_PREFILL_LOAD_SCALE = 1.0  # the published default
_OVERLAP_CREDIT = 1.0  # the published default for blocks in device memory


class KVCost(LeastLoaded):
    """A prefill worker by what is under way there and what it holds of the prompt; a decode worker by its blocks."""

    name = "kv_cost"

    def prefill_key(self, worker: WorkerView, demand: Demand) -> Key:
        return (self._cost(worker, demand), worker.worker_id)

    def decode_key(self, worker: WorkerView, demand: Demand) -> Key:
        if not self._expect_prefill:  # it computes the prompt too
            return (self._cost(worker, demand), worker.worker_id)
        return (self._decode_blocks(worker) + demand.blocks_now(worker.hello.spec), worker.worker_id)

    def _cost(self, worker: WorkerView, demand: Demand) -> float:
        size = worker.hello.spec.block_size
        under_way = worker.ahead_tokens / size
        overlap = _OVERLAP_CREDIT * demand.cached.get(worker.session, 0) / size
        prefill = max(under_way + demand.num_prompt_tokens / size - overlap, 0.0)
        return _PREFILL_LOAD_SCALE * prefill + self._decode_blocks(worker)

    @staticmethod
    def _decode_blocks(worker: WorkerView) -> float:
        return worker.context / worker.hello.spec.block_size
