"""Runs the steps of an engine: blocks are moved and batches launched, and later waited for.

A failure of the runner is kept, and told when its step is waited for; it does not raise.
"""

import time
from collections import deque
from collections.abc import Callable

from pageframe.core.clock import Clock
from pageframe.core.plan import StepPlan
from pageframe.core.step import StepTiming
from pageframe.executor.batch import Flight, Landed, ModelRunner, StepBatch, StepOutput
from pageframe.executor.batch_builder import BatchBuilder
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.in_flight import (
    StepInFlight,
    can_be_followed,
    has_room_to_follow,
    is_foreseen,
)
from pageframe.executor.memory.giving_up import fail_transfers
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.publishing import Publisher
from pageframe.executor.memory.retaining import finish_transfers
from pageframe.executor.step_failure import note_failure


class Launching:
    """The steps of one engine that are in flight.

    Args:
        runner: The model.
        memory: Which blocks are moved, and which pass the fence when a step is over.
        publisher: Catches up with finished steps.
        clock: Times steps.
        max_step_tokens: Most tokens of a step.
    """

    def __init__(
        self,
        runner: ModelRunner,
        memory: KvMemory,
        publisher: Publisher,
        clock: Clock,
        *,
        max_step_tokens: int,
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._publisher = publisher
        self._clock = clock
        self._in_flight: deque[StepInFlight] = deque()
        self._over_ns = 0
        # A batch is in use until it is collected, and two may be under way.
        self._builders = [
            BatchBuilder(memory.tables, memory.sequences, max_step_tokens=max_step_tokens)
            for _ in range(2)
        ]

    @property
    def num_in_flight(self) -> int:
        """Steps that have been launched and not waited for."""
        return len(self._in_flight)

    @property
    def newest(self) -> StepInFlight | None:
        """The step that was launched last, if it is in flight."""
        return self._in_flight[-1] if self._in_flight else None

    def may_follow(self, plan: StepPlan) -> bool:
        """Whether ``plan`` may be launched though the step before it has not been collected."""
        memory = self._memory
        return (
            len(self._in_flight) == 1
            and can_be_followed(self._in_flight[0])
            and plan.only_goes_on
            and plan.step == memory.last_received_step + 1
            and plan.builds_on == memory.last_applied_step
            and has_room_to_follow(memory)
        )

    def flight_under_way(self) -> Flight | None:
        """That of the step launched last; None where it is over already."""
        step = self._in_flight[-1]
        return step.flight if step.is_under_way else None

    def begin(self, step: StepInFlight, on_launch: Callable[[], None]) -> None:
        """Launch what was applied; of a refused plan there is nothing to launch.

        Args:
            step: It is the newest one from here on.
            on_launch: Called once, right before only the computing is left; not if there is none.
        """
        self._in_flight.append(step)
        if step.applied.result.refusal:
            return
        step.batch = self._builders[step.applied.result.step % 2].build(step.applied)
        step.sequence_ids = self._memory.sequences.sequence_ids[step.batch.rows]
        step.launch_ns = self._clock.now_ns()
        self._launch(step, step.batch, on_launch)

    def wait(self) -> tuple[StepInFlight, StepOutput | None]:
        """Wait for the oldest step: which it is, and what it yields; None when it failed."""
        step = self._in_flight[0]
        if step.batch is None:
            return self._in_flight.popleft(), None
        output = self._wait_for(step, step.batch)
        self._time(step, output or StepOutput())
        return self._in_flight.popleft(), output

    def _time(self, step: StepInFlight, output: StepOutput) -> None:
        """Say where the time went; beside the step before it, nobody waited for this one."""
        late_ns = time.monotonic_ns() - output.over_ns if output.over_ns else 0
        over_ns = self._clock.now_ns() - late_ns
        timing = step.applied.result.timing
        timing.start_ns, launch_ns = step.start_ns, step.launch_ns
        if step.follows:
            timing.start_ns = launch_ns = min(max(launch_ns, self._over_ns), over_ns)
        timing.apply_ns = launch_ns - timing.start_ns
        timing.execute_ns = max(0, over_ns - launch_ns - output.sample_ns)
        timing.sample_ns = output.sample_ns
        self._over_ns = over_ns

    def _launch(self, step: StepInFlight, batch: StepBatch, on_launch: Callable[[], None]) -> None:
        moves = self._memory.transfers.take()
        if moves is None and not len(batch.rows):
            return
        batch.meanwhile = self._publisher.catch_up
        batch.has_moves = step.has_moves = moves is not None
        self._memory.pool.launch(batch.step)
        step.is_complete = False
        try:
            if moves is None:
                batch.on_launch = on_launch
            else:
                on_launch()
                self._move(moves, step.applied.result.timing)
            # What follows may lack tokens, which only a launch looks up.
            if len(batch.rows) and (step.follows or is_foreseen(step, self._memory)):
                step.flight = self._runner.launch(batch)
            elif len(batch.rows):
                step.flight = Landed(self._runner.execute(batch))
        except Exception as error:
            step.error = error
        if step.is_under_way:
            # Law 4: whatever uses its blocks again does so behind it, on the same device.
            self._memory.pool.complete(batch.step)
            step.is_complete = True

    def _wait_for(self, step: StepInFlight, batch: StepBatch) -> StepOutput | None:
        memory, output = self._memory, StepOutput()
        if step.is_idle:
            return output
        try:
            if step.error is not None:
                raise step.error
            if step.flight is not None:
                output = step.flight.collect()
            num_tokens, num_samples = len(output.token_ids), len(batch.samples)
            assert num_tokens == num_samples, f"{num_tokens} tokens for {num_samples} samples"
        except Exception as error:
            step.failure = note_failure(batch.step, error)
            self._publisher.catch_up()
            self._complete(step, batch)
            fail_transfers(memory)
            return None
        self._publisher.catch_up()
        self._complete(step, batch)
        finish_transfers(memory)
        return output

    def _complete(self, step: StepInFlight, batch: StepBatch) -> None:
        if not step.is_complete:
            self._memory.pool.complete(batch.step)

    def _move(self, moves: BlockMoves, timing: StepTiming) -> None:
        for step in self._in_flight:
            # The runner makes moves at once; who computes still has these blocks.
            if step.flight is not None:
                step.flight.wait()
        start_ns = self._clock.now_ns()
        self._runner.move_blocks(moves)
        timing.num_blocks_moved = len(moves.out_slots) + len(moves.in_targets)
        if timing.num_blocks_moved:
            timing.copy_ns = self._clock.now_ns() - start_ns
