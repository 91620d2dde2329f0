"""Step times of a CPU by what was measured on it, apart for each part of a step; a model's shape says how much of each.

    products    weights x what one takes for so many rows: by few rows reading is what takes time, by many multiplying,
                and between them neither alone
    values      numbers of activations that norms, rotation and gates read or write, a layer and token
    scores      of a prompt: an exponential for each query head and pair, and products over the head's numbers
    cache       a decode row's keys and values, read at their own rate: products of few rows with short vectors;
                latents, which all heads share, while they are multiplied as a prompt's keys are
    layer       a layer's calls and the threads' meetings, by however many rows
    step        Python, sampling and all else that is there once

Of the last layer a prompt's tokens need keys and values alone: behind these only rows that sample are computed.

None of the rates is a model's: `benchmarks/sizing/probe.py` takes them from shapes of its own, with plain weights
and a number of threads. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .cpu_rates import CpuRates
from .steps import Roofline, StepWork, Terms


@dataclass(slots=True)
class CpuSteps(Roofline):
    """`num_gpus` ranks share a model, each with as many threads as the rates were measured with."""

    rates: CpuRates = field(kw_only=True)

    def _products_s(self, params: float, rows: float) -> float:
        return params * self.rates.product_s(rows) / self.num_gpus if rows else 0.0

    def _experts_s(self, params: float, tokens: float) -> float:
        if not params or not tokens:
            return 0.0
        model = self.model
        chosen = model.num_experts * (1 - (1 - model.experts_per_token / model.num_experts) ** tokens)
        return self._products_s(params * chosen / model.num_experts, tokens * model.experts_per_token / chosen)

    @property
    def _cached_s(self) -> float:
        """Return what it takes to read a token of a row's context."""
        model = self.model
        return model.kv_bytes_per_token * model.read_share * model.cache_byte_work * self.rates.cache_byte_s

    def terms(self, work: StepWork) -> Terms:
        model, rates, sampled = self.model, self.rates, work.decode_rows + work.draft_tokens
        tokens = work.prefill_tokens + sampled
        experts = model.num_params * model.expert_share if model.num_experts else 0.0
        rows, last_experts = sampled or 1, min(experts, model.last_experts)
        products_s = self._products_s(model.num_params - experts - model.head_params - model.last_params, tokens)
        products_s += self._experts_s(experts - last_experts, tokens) + self._experts_s(last_experts, rows)
        products_s += self._products_s(model.last_params + model.head_params, rows)
        score_s = rates.score_s + model.head_dim * rates.score_item_s
        return Terms(
            products=products_s + tokens * model.values_per_token * rates.value_s / self.num_gpus,
            weights=0.0,  # read meanwhile: in what products take
            attention=work.prefill_pairs * model.scores_per_pair * score_s / self.num_gpus,
            cache=work.decode_context * max(self._cached_s, model.row_scores_per_pair * score_s) / self.num_gpus,
            exchange=tokens * self._s_per_exchange,
            launches=rates.step_s + model.num_layers * rates.layer_s,
        )

    def step_s(self, work: StepWork) -> float:
        return self.terms(work).total_s

    def run(self, rows: int, context: int) -> tuple[float, float]:
        one, more = (self.step_s(StepWork(decode_rows=rows, decode_context=context + added)) for added in (0, rows))
        return one, more - one
