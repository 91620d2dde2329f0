"""A simulated worker's engine: one step after another, or many decode steps in one jump.

    wake ─> a part's batch ─> step time ─> [end] ─> the part's results ─> the next batch

While the same rows decode, nothing happens but that each step takes a little longer than the one before it. So steps up
to the next finish are one event; who looks in between (a heartbeat, a reservation) sees the state after the steps that
are over by then, and whoever brings new work cuts the jump after the step that runs. With `jumps=False` every step is
an event of its own, which changes nothing but the time that it takes to simulate.

With host memory below the device a step begins with copies, which take their time; a jump ends where a step may copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import exp, sqrt
from random import Random

from ..common.batch import Batch
from ..common.messages import StepSample, StepTokens
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from ..prefill.scheduler import MAX_STEP_S
from .costs.steps import StepModel, StepWork
from .decode import Answer, DecodePart
from .jump import Figures, Step, work_of
from .kernel import Kernel
from .prefill import PrefillPart

_MAX_JUMP = 1 << 16
_KEPT_SAMPLES = 8
_SAMPLES_PER_STATUS = 4
_EVERY_DECODE_STEP = 8
_REMEMBERED_STEPS = 48  # a moving average of weight 0.3 knows nothing of those before


class Engine:
    """One per worker life. `wake` whenever there may be work."""

    def __init__(
        self,
        kernel: Kernel,
        cache: PrefixCache,
        pool: BlockPool,
        model: StepModel,
        prefill: PrefillPart,
        decode: DecodePart,
        random: Random,
        *,
        copy_s: float,
        jumps: bool,
    ) -> None:
        self._kernel = kernel
        self._cache = cache
        self._pool = pool
        self._copy_s = copy_s  # of one block
        self._model = model
        self._prefill = prefill
        self._decode = decode
        self._random = random
        self._jumps = jumps
        self._step: Step | None = None
        self._is_waking = False
        self._had_turn: PrefillPart | DecodePart = decode
        self._was_idle = True
        self._num_steps = 0  # finished
        self._last = (0.0, 0)
        self._samples: deque[StepSample] = deque(maxlen=_KEPT_SAMPLES)
        self.is_dead = False
        self.busy_s = 0.0

    # --- steps ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be work: begin, or end the jump with the step that runs."""
        if self.is_dead:
            return
        if self._step is None:
            if not self._is_waking:
                self._is_waking = True
                self._kernel.after(0.0, self._begin)
        else:
            self._cut(self._step, self._step.over(self._kernel.now()) + 1)

    def _begin(self) -> None:
        self._is_waking = False
        if self._step is not None or self.is_dead:
            return
        self._prefill.scheduler.max_step_s = self._prefill_step_s()
        for part in self._turns():
            batch = part.schedule()
            if batch is not None:
                self._had_turn, self._was_idle = part, False
                self._start(part, batch)
                return
        self._was_idle = True
        copies = self._cache.idle()
        if copies is not None:
            self._had_turn = self._decode
            self._start(self._decode, copies)

    def _turns(self) -> tuple[PrefillPart | DecodePart, PrefillPart | DecodePart]:
        """Return the sides in the order in which they are asked, as in `worker/roles.py`."""
        if self._had_turn is self._decode and not self._was_idle:
            return self._prefill, self._decode
        return self._decode, self._prefill

    def _prefill_step_s(self) -> float:
        decode = self._decode.scheduler
        return min(MAX_STEP_S, decode.pace.room_s) if decode.num_running else MAX_STEP_S

    def _start(self, part: PrefillPart | DecodePart, batch: Batch) -> None:
        work = work_of(batch)
        num_steps = self._steps_to_jump(batch, work) if part is self._decode else 1
        swap_s = (len(batch.swap_out) + len(batch.swap_in)) * self._copy_s
        first_s, slope_s = self._model.step_s(work) if batch.rows else 0.0, 0.0
        if num_steps > 1:
            first_s, slope_s = self._model.run(work.decode_rows, work.decode_context)
        factor = self._draw(num_steps)
        step = Step(
            part, batch, work, self._kernel.now(), num_steps, first_s * factor + swap_s, slope_s * factor, swap_s
        )
        self._step = step
        if num_steps > 1:
            step.num_steps = num_steps = self._steps_with_blocks(step)
        if part is self._prefill:
            self._prefill.begin_step(batch, step.end_s(1))
        elif num_steps > 1:
            fresh = [row for row in batch.rows if self._decode.answers[row.seq.request_id].num_told <= 1]
            if fresh:
                answers = [self._decode.answers[row.seq.request_id] for row in fresh]
                self._kernel.at(step.end_s(1), self._tell_first, step, answers)
        self._kernel.at(step.end_s(num_steps), self._end, step, step.version)

    def _draw(self, num_steps: int) -> float:
        noise = self._model.noise
        if not noise:
            return 1.0
        spread = noise / sqrt(num_steps)
        return exp(self._random.gauss(0.0, spread) - spread * spread / 2)

    def _steps_to_jump(self, batch: Batch, work: StepWork) -> int:
        """Count the steps that pass before anything but their number changes."""
        if not self._jumps or work.prefill_tokens or batch.block_copies or batch.swap_out or batch.swap_in:
            return 1
        if self._prefill.scheduler.prompts or len(batch.rows) < len(self._decode.scheduler.running):
            return 1
        if not self._cache.is_settled:
            return 1
        answers = self._decode.answers
        longest = min(answers[row.seq.request_id].num_missing for row in batch.rows)
        if not all(row.samples for row in batch.rows):
            return 1
        return min(longest, _MAX_JUMP)

    def _steps_with_blocks(self, step: Step) -> int:
        """Count the jump's steps that there are blocks for; with another tier, those for which none takes a block."""
        free, size = self._pool.num_free_blocks if not self._cache.has_tiers else 0, self._pool.block_size
        had = step.growth(step.done, size)
        if step.growth(step.num_steps - 1, size) - had <= free:
            return step.num_steps
        enough = bisect_right(range(step.done, step.num_steps), free, key=lambda n: step.growth(n, size) - had)
        return step.done + max(1, enough)

    def _cut(self, step: Step, num_steps: int) -> None:
        """The jump ends after so many steps."""
        if num_steps >= step.num_steps:
            return
        step.num_steps = num_steps
        step.version += 1
        self._kernel.at(step.end_s(num_steps), self._end, step, step.version)

    def sync(self) -> None:
        """Bring the books up to now: whoever takes blocks must find those that running sequences have taken."""
        step = self._step
        if step is not None and step.num_steps > 1:
            self._advance(step, step.over(self._kernel.now()))

    def sync_blocks(self) -> None:
        """Bring the books up to now if blocks have filled meanwhile: they can be found from then on."""
        step = self._step
        if step is not None and step.num_steps > 1:
            over = step.over(self._kernel.now())
            if over > step.done and self._grown(step, over):
                self._advance(step, over)

    def _grown(self, step: Step, over: int) -> int:
        """Blocks that steps have taken which are not in the books."""
        size = self._pool.block_size
        return step.growth(over, size) - step.growth(step.done, size)

    def _advance(self, step: Step, done: int) -> None:
        if done > step.done:
            self._take_samples(step, done)
            self._learn(step, done)
            self._decode.skip(step.batch, done - step.done)
            step.done = done

    def _learn(self, step: Step, done: int) -> None:
        """The scheduler's own averages look back a few steps."""
        pace = self._decode.scheduler.pace
        for number in range(max(step.done, done - _REMEMBERED_STEPS), done):
            seconds = step.seconds(number + 1) - step.seconds(number)
            pace.learn(seconds, num_chunk_tokens=0, num_rows=step.work.decode_rows)

    def recheck(self) -> None:
        """Blocks were taken (after `sync`): does the jump still have all that it needs?"""
        step = self._step
        if step is not None and step.num_steps > 1:
            has_tiers = self._cache.has_tiers  # then what was taken may be copied out by the next step
            self._cut(step, step.over(self._kernel.now()) + 1 if has_tiers else self._steps_with_blocks(step))

    def _end(self, step: Step, version: int) -> None:
        if self._step is not step or step.version != version or self.is_dead:
            return
        if step.num_steps > 1:
            self._advance(step, step.num_steps - 1)
        seconds = step.seconds(step.num_steps)
        last_s = seconds - (step.seconds(step.num_steps - 1) if step.num_steps > 1 else 0.0)
        self._take_samples(step, step.num_steps)
        self._num_steps += step.num_steps
        self.busy_s += seconds
        self._last = (last_s, step.batch.num_tokens)
        step.part.complete(step.batch, last_s, step.swap_s)
        self._step = None
        self._begin()

    def _tell_first(self, step: Step, answers: list[Answer]) -> None:
        """The first step of a jump is over: whose first decoded tokens came with it?"""
        if self.is_dead or self._step is not step or step.num_steps == 1:
            return
        self.sync()
        decode = self._decode
        updates = [
            decode.tell(answer)
            for answer in answers
            if answer.num_told <= 1 and decode.answers.get(answer.spec.request_id) is answer
        ]
        if updates:
            decode.to_router(StepTokens(updates=tuple(updates)))

    def flush(self) -> None:
        """The worker dies: everything that it would have streamed by now."""
        self.sync()
        decode = self._decode
        updates = [decode.tell(answer) for answer in decode.answers.values() if answer.num_outputs > answer.num_told]
        if updates:
            decode.to_router(StepTokens(updates=tuple(updates)))

    # --- what a heartbeat says ----------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self._step is not None

    def figures(self) -> Figures:
        """Return the figures as of now, in closed form: nothing is brought up to date."""
        step, decode = self._step, self._decode.scheduler
        free = self._pool.num_free_blocks
        if step is None or step.num_steps == 1:
            busy_s = self._kernel.now() - step.start_s if step is not None else 0.0
            return Figures(self._num_steps, busy_s, *self._last, free, decode.num_context_tokens, decode.waiting_tokens)
        over, rows = step.over(self._kernel.now()), step.work.decode_rows
        self._take_samples(step, over)
        if over > step.done:
            free -= self._grown(step, over)
        ended_s = step.seconds(over)
        last = (ended_s - step.seconds(over - 1), rows) if over else self._last
        busy_s = self._kernel.now() - step.start_s - ended_s
        waiting = sum(seq.num_uncomputed_tokens for seq in decode.waiting)
        context = step.work.decode_context + over * rows
        return Figures(self._num_steps + over, busy_s, *last, free, context, waiting)

    def _take_samples(self, step: Step, until: int) -> None:
        """Sample steps that have ended: every one with prompts, every eighth without."""
        if not step.batch.rows:
            return
        work, every = step.work, 1 if step.work.prefill_tokens else _EVERY_DECODE_STEP
        first = -(-(self._num_steps + step.sampled) // every) * every - self._num_steps
        for number in range(first, until, every):
            seconds = step.seconds(number + 1) - step.seconds(number)
            context = work.decode_context + number * work.decode_rows
            self._samples.append(
                StepSample(seconds, work.prefill_tokens, work.prefill_pairs, work.decode_rows, context)
            )
        step.sampled = max(step.sampled, until)

    def take_samples(self) -> tuple[StepSample, ...]:
        """Return the samples since the last heartbeat; where there were more, an even choice."""
        samples = list(self._samples)
        self._samples.clear()
        if len(samples) <= _SAMPLES_PER_STATUS:
            return tuple(samples)
        return tuple(samples[index * len(samples) // _SAMPLES_PER_STATUS] for index in range(_SAMPLES_PER_STATUS))
