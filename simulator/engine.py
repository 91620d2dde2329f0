"""A simulated worker's engine: one step after another, or many decode steps in one jump.

    wake ─> the core's batch ─> step time ─> [end] ─> a run of tokens for each row ─> the core ─> the next batch

While the same rows decode, nothing happens but that each step takes a little longer than the one before it. So steps up
to the next finish are one event, which yields a run of tokens for every row. Whoever looks in between (a heartbeat, a
reservation) finds the blocks taken that the steps over by then have taken, and whoever brings new work ends the jump
with the step that runs. With `jumps=False` every step is an event of its own, which changes nothing but the time that
it takes to simulate.

With host memory below the device a step begins with copies, which take their time; a jump ends where a step may copy.
Where tokens are drafted no two steps are alike, and none is jumped over; a draft model's part of a step is in its time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from math import exp, sqrt
from random import Random

from ..common.batch import Batch, RowOutput, StepOutput, stopped_output
from ..common.request import Sequence
from ..engine.loop import StepFigures
from ..sizing.steps import StepWork
from ..worker.core import WorkerCore
from .costs.drafting import draft_s
from .jobs import TOKEN, Job, yielded
from .jump import Step, work_of
from .kernel import Kernel
from .setup import WorkerSpec

_MAX_JUMP = 1 << 16
_EVERY_DECODE_STEP = 8
_REMEMBERED_STEPS = 48  # a moving average of weight 0.3 knows nothing of those before


class Engine:
    """One per worker life. `wake` whenever there may be work, `sync` before the core is called and `recheck` after."""

    def __init__(
        self,
        kernel: Kernel,
        core: WorkerCore,
        spec: WorkerSpec,
        jobs: Mapping[str, Job],
        random: Random,
        tell_early: Callable[[list[Sequence]], None],
    ) -> None:
        self._kernel = kernel
        self._core = core
        self._scheduler = core.decode.scheduler
        self._pool = core.pool
        self._cache = core.cache
        self._spec = spec
        self._model = spec.steps
        self._jobs = jobs
        self._random = random
        self._tell_early = tell_early
        self._step: Step | None = None
        self._is_waking = False
        self._scene: tuple[int, ...] = ()
        self._num_free = 0  # as the jump that runs has left them
        self._num_steps = 0  # finished
        self._last = (0.0, 0)
        self.step_end_s = 0.0  # of the single step that runs
        self.is_scheduling = False
        self.is_dead = False
        self.busy_s = 0.0

    # --- steps ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Begin, if nothing runs: there may be work. `recheck` looks after a jump that runs."""
        if self._step is None and not self._is_waking and not self.is_dead and self._has_work:
            self._is_waking = True
            self._kernel.after(0.0, self._begin)

    def stop(self) -> None:
        """End a single step: nobody wants it. A jump ends with the step that it is in, as for any other change."""
        step = self._step
        if step is not None and step.num_steps == 1:
            step.stopped_s = self._kernel.now()
            step.version += 1
            self._kernel.after(0.0, self._end, step, step.version)

    @property
    def _has_work(self) -> bool:
        """Say whether an idle engine is not asked in vain."""
        core = self._core
        has_sequences = any(self._look()) or bool(core.prefill.scheduler.prompts or core.receiver.arrived)
        return has_sequences or core.decode.num_waiting_reservations > 0 or not self._is_settled

    @property
    def _is_settled(self) -> bool:
        """Say whether neither blocks nor adapters are on their way to where they are wanted."""
        adapters = self._core.adapters
        return self._cache.is_settled and (adapters is None or adapters.is_settled)

    def _begin(self) -> None:
        self._is_waking = False
        if self._step is None and not self.is_dead:
            self._schedule(self._kernel.now())

    def _schedule(self, start_s: float) -> None:
        self.is_scheduling = True
        batch = self._core.steps.schedule()
        self.is_scheduling = False
        if batch is not None:
            self._start(batch, start_s)

    def _start(self, batch: Batch, start_s: float) -> None:
        work = work_of(batch)
        num_steps = most_steps = self._steps_to_jump(batch, work)
        swap_s = (len(batch.swap_out) + len(batch.swap_in)) * self._spec.copy_s
        first_s, slope_s = self._model.step_s(work) if batch.rows else 0.0, 0.0
        if num_steps > 1:
            first_s, slope_s = self._model.run(work.decode_rows, work.decode_context)
        factor = self._draw(num_steps)
        drafting_s = draft_s(batch, self._model, self._spec.fleet.draft_share) * factor
        first_s = first_s * factor + swap_s + drafting_s
        size = self._pool.block_size
        step = Step(batch, work, start_s, num_steps, most_steps, first_s, slope_s * factor, size, swap_s, drafting_s)
        self._step = step
        if num_steps > 1:
            step.num_steps = num_steps = self._steps_with_blocks(step)
            self._scene, self._num_free = self._look(), self._pool.num_free_blocks
            fresh = [row.seq for row in batch.rows if len(row.seq.token_ids) - row.seq.num_prompt_tokens == 1]
            if fresh:
                self._kernel.at(step.end_s(1), self._tell_first, step, fresh)
        self.step_end_s = step.end_s(1)
        self._core.steps.begin_step(batch)
        self._kernel.at(step.end_s(num_steps), self._end, step, step.version)

    def _draw(self, num_steps: int) -> float:
        noise = self._model.noise
        if not noise:
            return 1.0
        spread = noise / sqrt(num_steps)
        return exp(self._random.gauss(0.0, spread) - spread * spread / 2)

    def _end(self, step: Step, version: int) -> None:
        if self._step is step and step.version == version and not self.is_dead:
            self._complete(step, step.num_steps)
            self._schedule(self._kernel.now())

    def _complete(self, step: Step, num_steps: int) -> None:
        """Give the core what the first `num_steps` steps have yielded: they are over."""
        if step.stopped_s is not None:
            output = stopped_output(step.batch, step.stopped_s - step.start_s, step.swap_s)
            return self._give(step, output, 1, output.step_s)
        self._take_blocks(step, num_steps - 1)
        self._sample(step, num_steps)
        self._learn(step, num_steps - 1)
        if num_steps < step.most_steps:
            rows = [RowOutput(((TOKEN,) * num_steps,))] * len(step.batch.rows)
        else:
            rows = [yielded(row, self._jobs[row.seq.request_id], num_steps) for row in step.batch.rows]
        output = StepOutput(rows, step.step_s(num_steps - 1), step.batch.num_tokens, step.swap_s, step.draft_s)
        self._give(step, output, num_steps, step.seconds(num_steps))

    def _give(self, step: Step, output: StepOutput, num_steps: int, taken_s: float) -> None:
        self._num_steps += num_steps
        self._last = (output.step_s, output.num_tokens)
        self.busy_s += taken_s
        self._step = None
        self._core.steps.complete(step.batch, output)

    def _tell_first(self, step: Step, fresh: list[Sequence]) -> None:
        """The first step of a jump is over: the first tokens that were decoded in it leave."""
        if self._step is step and step.num_steps > 1 and not self.is_dead:
            self._tell_early(fresh)

    def _learn(self, step: Step, num_steps: int) -> None:
        """The scheduler's own averages look back a few steps; the last one it sees itself."""
        for number in range(max(0, num_steps - _REMEMBERED_STEPS), num_steps):
            self._scheduler.pace.learn(step.step_s(number), num_chunk_tokens=0, num_rows=step.work.decode_rows)

    # --- jumps ------------------------------------------------------------------------------------------------

    def _steps_to_jump(self, batch: Batch, work: StepWork) -> int:
        """Count the steps that pass before anything but their number changes."""
        if not self._spec.jumps or self._scheduler.speculation is not None:
            return 1
        if work.prefill_tokens or batch.block_copies or batch.swap_out or batch.swap_in:
            return 1
        if self._core.roles.stepping != "decode" or self._core.prefill.scheduler.prompts:
            return 1
        if len(batch.rows) < self._scheduler.num_running or not self._is_settled:
            return 1
        if not all(row.samples for row in batch.rows):
            return 1
        seqs = [row.seq for row in batch.rows]
        return min(_MAX_JUMP, *(self._jobs[seq.request_id].num_tokens - len(seq.token_ids) for seq in seqs))

    def _steps_with_blocks(self, step: Step) -> int:
        """Count the jump's steps that there are blocks for; with another tier, those for which none takes a block."""
        free = self._pool.num_free_blocks if not self._cache.has_tiers else 0
        had = step.growth(step.done)
        if step.growth(step.num_steps - 1) - had <= free:
            return step.num_steps
        enough = bisect_right(range(step.done, step.num_steps), free, key=lambda n: step.growth(n) - had)
        return step.done + max(1, enough)

    def _take_blocks(self, step: Step, over: int) -> None:
        """Take the blocks of the rows that have gone through so many steps, and are in the next one."""
        if over > step.done and step.growth(over) > step.growth(step.done):
            blocks, size = self._scheduler.blocks, step.block_tokens
            for row in step.batch.rows:
                seq = row.seq
                while len(seq.block_table) * size <= seq.num_computed_tokens + over:
                    blocks.grow(seq)
        step.done = max(step.done, over)

    def sync(self) -> None:
        """Bring the blocks up to now: whoever takes some must find those taken that running sequences have."""
        step = self._step
        if step is not None and step.num_steps > 1 and (now := self._kernel.now()) >= step.grows_s:
            self._take_blocks(step, step.over(now))
            self._num_free = self._pool.num_free_blocks
            step.grows_s = step.end_s(step.next_growth())

    def recheck(self) -> None:
        """Something has happened (after `sync`): end the jump with the step that runs, or when blocks are short."""
        step = self._step
        if step is None or step.num_steps == 1:
            return
        num_free = self._pool.num_free_blocks
        if self._has_news(num_free):
            self.end_jump()
        elif num_free < self._num_free:
            self._cut(step, self._steps_with_blocks(step))
        self._num_free = num_free

    def _has_news(self, num_free: int) -> bool:
        """Say whether the next step may be another one than the jump's."""
        core = self._core
        if core.prefill.scheduler.prompts or core.receiver.arrived or not self._is_settled:
            return True
        if num_free != self._num_free and self._cache.has_tiers:
            return True
        if num_free > self._num_free and (self._scheduler.queues.waiting or core.decode.num_waiting_reservations):
            return True  # somebody waits for blocks
        return self._scene != self._look()

    def _look(self) -> tuple[int, ...]:
        queues = self._scheduler.queues
        return len(queues.running), len(queues.parked), len(queues.waiting), len(self._core.fetches)

    def end_jump(self) -> None:
        """End the jump with the step that runs, whatever has happened."""
        step = self._step
        if step is not None and step.num_steps > 1:
            self._cut(step, step.over(self._kernel.now()) + 1)

    def _cut(self, step: Step, num_steps: int) -> None:
        """The jump ends after so many steps."""
        if num_steps >= step.num_steps:
            return
        step.num_steps = num_steps
        step.version += 1
        self._kernel.at(step.end_s(num_steps), self._end, step, step.version)

    def split(self) -> None:
        """Give the core what there is by now; the step that runs is a batch of its own from here on."""
        step = self._step
        if step is not None and (over := step.over(self._kernel.now())):
            self._complete(step, over)
            self._schedule(step.end_s(over))

    # --- what a heartbeat says ----------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self._step is not None

    def figures(self) -> StepFigures:
        """Return the figures as of now; the core gets samples of the steps that are over."""
        step = self._step
        if step is None:
            return StepFigures(self._num_steps, 0.0, *self._last)
        over = step.over(self._kernel.now())
        self._sample(step, over)
        ended_s = step.seconds(over)
        last = (step.step_s(over - 1), step.work.decode_rows) if over else self._last
        return StepFigures(self._num_steps + over, self._kernel.now() - step.start_s - ended_s, *last)

    @property
    def num_ahead_tokens(self) -> int:
        """Count the tokens that steps of the running jump have yielded, and that the core has not."""
        step = self._step
        return step.over(self._kernel.now()) * step.work.decode_rows if step is not None else 0

    def _sample(self, step: Step, until: int) -> None:
        """Sample steps that have ended: every one with prompts, every eighth without."""
        every = 1 if step.work.prefill_tokens else _EVERY_DECODE_STEP
        first = -(-(self._num_steps + step.sampled) // every) * every - self._num_steps
        for number in range(first, until, every) if step.is_plain else ():
            self._core.samples.add(step.sample(number))
        step.sampled = max(step.sampled, until)
