"""The predictor says how long things take on each worker: prefill, decode steps, transfers; all measured, none set.

    WorkerHello.samples (self-calibration) ──┐
    WorkerStatus.samples (each heartbeat) ───┴─> fits of the worker's kind ─> x the worker's own factor ─> seconds
    TransferReport ─> bandwidth and exposed time of each path (how far apart two workers are)
    finished requests ─> what predictions of first tokens miss by, for each way of computing a prompt

Workers with the same model, ranks and transport are of one kind and share fits: what one shows, all know. Whether one
of them is slower than its kind is learned from its own steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from ...wire.workers import StepSample, TransferReport, WorkerHello, WorkerStatus
from .step_fit import StepFit, step_s

_COLD_STEPS = 4  # of a worker's life without a calibration: they load code and warm caches
_MAX_SAMPLES_PER_STATUS = 4  # learned from in one heartbeat; more cost time in a large fleet
_FEW_WORKERS = 16  # of a kind, up to which every heartbeat is learned from; of more, every second, third ...
_SMOOTHING = 0.05  # weight of the newest sample in a mean; larger follows sooner, smaller scatters less
_MIN_FACTOR, _MAX_FACTOR = 0.25, 4.0  # of one sample, to how fast a worker is beside its kind: more is an outlier
_BANDWIDTH_DECAY = 0.999  # of the best seen, for each report: a path may have become slower
_MOST_BIAS_S = 0.05  # learned from one first token, with _MOST_BIAS of its prediction: what is more was chance
_MOST_BIAS = 0.1  # share of the prediction
_LEAST_SHARE = 0.25  # of what its steps take, that a first token takes whatever was learned from others
_KEPT_ERRORS = 512  # latest ratios that are kept for whoever asks
_UNKNOWN_ANSWER_TOKENS = 256  # expected of an answer before any has ended
_TINY_S = 1e-9


class Way(StrEnum):
    """A way in which a prompt is computed."""

    HANDOFF = "handoff"
    LOCAL = "local"


@dataclass(slots=True)
class _Kind:
    """Workers that should be equally fast."""

    prompts: StepFit = field(default_factory=StepFit)
    decodes: StepFit = field(default_factory=StepFit)
    num_workers: int = 0

    def fit_of(self, sample: StepSample) -> StepFit:
        return self.prompts if sample.prefill_tokens else self.decodes


@dataclass(slots=True)
class _KnownWorker:
    """A worker, as one session knows it."""

    kind: _Kind
    hello: WorkerHello
    factor: float = 1.0

    def rows_s(self, rows: int, context: int) -> float:
        """Return what rows of one token take in a step that computes prompts too, without the worker's factor."""
        rows_s = self.kind.prompts.costs.step_s(rows=rows, context=context)
        if not self.kind.decodes.is_known:
            return rows_s
        # They cost no more beside a chunk than alone. Without that, a fit that finds no room for prompts among streams
        # would see no such step any more, and never learn better.
        return min(rows_s, self.kind.decodes.costs.step_s(rows=rows, context=context))

    def chunk_token_s(self, behind: int) -> float:
        """Return what a prompt token takes there that has `behind` tokens before it, without the worker's factor."""
        costs = self.kind.prompts.costs
        return costs.token_s + behind * costs.pair_s


@dataclass(slots=True)
class _Path:
    least_bytes_per_s: float = 0.0  # it has carried so much while prompts were being computed; 0: not known
    s_per_byte: float = 0.0  # of the last layer's pages, which nothing else delays
    exposed_s: float = 0.0  # from the last layer's end to the last byte's arrival
    num_reports: int = 0


@dataclass(slots=True)
class Bias:
    """The time beyond what steps predict: messages, scheduling, everything that no step shows."""

    seconds: float = 0.0
    num_seen: int = 0

    def observe(self, missed_s: float) -> None:
        weight = max(_SMOOTHING, 1.0 / (self.num_seen + 1))
        self.seconds += weight * (missed_s - self.seconds)
        self.num_seen += 1


class Predictor:
    """`Predictor` learns of one router's workers. Sessions are numbers, as everywhere in the router."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._workers: dict[int, _KnownWorker] = {}
        self._paths: dict[str, _Path] = {}
        self.biases: dict[Way, Bias] = {way: Bias() for way in Way}
        self.ttft_errors: deque[float] = deque(maxlen=_KEPT_ERRORS)  # actual / predicted
        self._answer_tokens = 0.0
        self._num_answers = 0

    # --- what is seen ---------------------------------------------------------------------------------------

    def on_hello(self, session: int, hello: WorkerHello) -> None:
        key = (hello.spec.fingerprint, hello.tp_size, hello.transport, hello.model)
        kind = self._kinds.setdefault(key, _Kind())
        self._workers[session] = _KnownWorker(kind, hello)
        kind.num_workers += 1
        for sample in hello.samples if kind.num_workers <= _FEW_WORKERS else ():
            kind.fit_of(sample).observe(sample)

    def on_status(self, session: int, status: WorkerStatus) -> None:
        known = self._workers.get(session)
        if known is None or (status.steps <= _COLD_STEPS and not known.hello.samples):
            return
        if status.seq % (1 + known.kind.num_workers // _FEW_WORKERS):
            return  # many workers of a kind: each need not be heard each time
        for sample in status.samples[:_MAX_SAMPLES_PER_STATUS]:
            fit = known.kind.fit_of(sample)
            expected_s = step_s(fit.costs, sample) * known.factor if fit.is_known else 0.0
            if fit.observe(sample) and expected_s > 0:
                ratio = known.factor * sample.step_s / expected_s
                known.factor += _SMOOTHING * (min(_MAX_FACTOR, max(_MIN_FACTOR, ratio)) - known.factor)

    def forget(self, session: int) -> None:
        known = self._workers.pop(session, None)
        if known is not None:
            known.kind.num_workers -= 1

    def on_transfer(self, report: TransferReport, path: str, num_layers: int) -> None:
        """`path`: how far apart the two are (`distance`).

        A transfer takes as long as its prompt, layer after layer. What is seen of the path is the last layer alone.
        """
        if not report.clean or report.transfer_s <= 0:
            return
        known = self._paths.setdefault(path, _Path())
        rate = report.num_bytes / report.transfer_s
        known.least_bytes_per_s = max(known.least_bytes_per_s * _BANDWIDTH_DECAY, rate)
        known.num_reports += 1
        weight = max(_SMOOTHING, 1.0 / known.num_reports)
        if report.num_bytes:
            s_per_byte = report.exposed_s * max(1, num_layers) / report.num_bytes
            known.s_per_byte += weight * (s_per_byte - known.s_per_byte)
        known.exposed_s += weight * (report.exposed_s - known.exposed_s)

    def on_first_token(
        self, way: Way, predicted_s: float, actual_s: float, *, bare_s: float, wait_s: float = 0.0
    ) -> None:
        """Both from the placement on. `bare_s`, `wait_s`: of the prediction, for the prompt's own steps and for prompts
        ahead: a token that waited for others tells nothing of what every request takes."""
        if predicted_s > 0:
            self.ttft_errors.append(actual_s / predicted_s)
        if bare_s > 0 and wait_s == 0.0:
            most_s = _MOST_BIAS_S + _MOST_BIAS * predicted_s
            self.biases[way].observe(min(most_s, max(-most_s, actual_s - bare_s)))

    def on_finished(self, num_output_tokens: int) -> None:
        """The length of one choice's answer."""
        self._num_answers += 1
        weight = max(_SMOOTHING / 5, 1.0 / self._num_answers)
        self._answer_tokens += weight * (num_output_tokens - self._answer_tokens)

    def expected_output(self, max_tokens: int) -> int:
        """Tokens of an answer that may have `max_tokens`."""
        return min(max_tokens, round(self._answer_tokens) if self._num_answers else _UNKNOWN_ANSWER_TOKENS)

    # --- what is expected -----------------------------------------------------------------------------------

    def is_known(self, session: int) -> bool:
        """Steps of prompts were seen on workers like it."""
        known = self._workers.get(session)
        return known is not None and known.kind.prompts.is_known

    def prefill_s(self, session: int, new_tokens: int, context: int) -> float:
        """Return the time to compute `new_tokens` behind `context` tokens that have KV, alone on the worker."""
        known = self._workers.get(session)
        if known is None or new_tokens <= 0:
            return 0.0
        steps = math.ceil(new_tokens / known.hello.max_num_batched_tokens)
        costs = known.kind.prompts.costs
        pairs = new_tokens * (context + new_tokens / 2)
        return known.factor * (steps * costs.base_s + new_tokens * costs.token_s + pairs * costs.pair_s)

    def unloaded_s(self, num_prompt_tokens: int) -> float:
        """A first token on empty workers, of whichever kind; 0 while none is known."""
        for session in filter(self.is_known, self._workers):
            return self.first_token_s(Way.HANDOFF, self.prefill_s(session, num_prompt_tokens, 0))
        return 0.0

    def first_token_s(self, way: Way, bare_s: float, wait_s: float = 0.0) -> float:
        """Return the time from the placement to the first token, never next to nothing.

        Added up are `wait_s` for prompts ahead, `bare_s` for the prompt's own steps, and what comes beyond them; or
        less, where steps were measured while the machine was busier.
        """
        return wait_s + max(_LEAST_SHARE * bare_s, bare_s + self.biases[way].seconds)

    def decode_step_s(self, session: int, rows: int, context: int) -> float:
        """A step that feeds one token of each of `rows` sequences with `context` tokens in all."""
        known = self._workers.get(session)
        if known is None:
            return 0.0
        return known.factor * known.kind.decodes.costs.step_s(rows=rows, context=context)

    def chunk_tokens(self, session: int, rows: int, context: int, behind: int, limit_s: float) -> int:
        """Prompt tokens that fit into a step of `limit_s` beside the rows; `behind`: the chunk's own context."""
        known = self._workers.get(session)
        if known is None:
            return 0
        room_s = limit_s / known.factor - known.rows_s(rows, context)
        tokens = max(0.0, room_s / max(_TINY_S, known.chunk_token_s(behind)))
        return int(min(known.hello.max_num_batched_tokens, tokens))

    def chunk_step_s(self, session: int, rows: int, context: int, behind: int, tokens: int) -> float:
        """Return what a step takes that computes so many prompt tokens beside the rows: `chunk_tokens` turned round."""
        known = self._workers.get(session)
        if known is None:
            return 0.0
        return known.factor * (known.rows_s(rows, context) + tokens * known.chunk_token_s(behind))

    def transfer_s(self, path: str, num_bytes: int) -> float:
        """Return the time of a whole transfer, nothing hidden; 0 while the path is unknown."""
        known = self._paths.get(path)
        if known is None or not known.least_bytes_per_s:
            return 0.0
        longest_s = 1.0 / known.least_bytes_per_s
        return num_bytes * (min(known.s_per_byte, longest_s) or longest_s)

    def exposed_s(self, path: str, num_bytes: int, prefill_s: float) -> float:
        """Return how much of a layer-wise transfer is left when the prompt is computed."""
        known = self._paths.get(path)
        if known is None:
            return 0.0
        return max(known.exposed_s, self.transfer_s(path, num_bytes) - prefill_s)


def distance(source: WorkerHello, target: WorkerHello) -> str:
    """The narrowest place that two workers share, by their labels from wide to narrow: "host", "rack", ..., "apart"."""
    shared = "apart"
    for mine, theirs in zip(source.labels, target.labels, strict=False):
        if mine != theirs:
            break
        shared = mine[0]
    return shared
