"""Beam searches over the real engine and KV memory, with recorded ancestry.

The scheduler has no part in this: plans are written here, as a beam group's would be. In each step
all beams of all groups take a token; then, by the recording,

    parents  0  0  2      beam 0 goes on twice, beam 1 ends, beam 2 goes on
             │  │  │
    beams    0  1  2

These are the engine's own branches: a child shares all blocks of its parent, and a shared block
that is partly filled is copied before it is written. Dropped beams end with the plan that no longer
continues them, before anything is allocated.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle

import numpy as np

from bench.paper.ancestry import Parents, replay
from bench.paper.cost_model import CostModel
from bench.paper.lengths import MAX_MODEL_LEN, Lengths
from bench.paper.metering import VOCAB_SIZE, MeteredRunner, read_usage
from bench.paper.run_log import Usage, UsageTable
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import ceil_div
from pageframe.executor.batch import StepBatch
from pageframe.executor.engine import StepEngine

_NUM_BEAMS_AT_ONCE = 128


@dataclass(slots=True)
class _Group:
    """One request: its beams, and the steps that they will take.

    Attributes:
        num_steps_left: Tokens that each beam still computes.
        steps: Parents of every step to come.
        beam_ids: Sequences, by place in the beam; at first the prompt alone.
    """

    num_steps_left: int
    steps: Iterator[list[int]]
    beam_ids: list[int]


class BeamServer:
    """Serves requests with beam search, several at a time, until all are done.

    Args:
        recording: Ancestry to replay; its last dimension is the width.
        cost: Cost of a step. Memory has room for all beams without sharing, so nobody waits.
        block_size: Tokens per block.
        seed: Of token ids, and of the order of the recorded searches.
    """

    def __init__(self, recording: Parents, cost: CostModel, *, block_size: int, seed: int) -> None:
        self._recording = recording
        self._width = width = recording.shape[2]
        self._rng = np.random.default_rng(seed)
        self._clock = ManualClock(1)
        self._num_groups_max = _NUM_BEAMS_AT_ONCE // width
        num_rows = self._num_groups_max * width
        self._runner = MeteredRunner(
            cost, num_rows=num_rows, clock=self._clock, on_execute=self._note_usage
        )
        self._engine = StepEngine(
            self._runner,
            num_blocks=num_rows * ceil_div(MAX_MODEL_LEN, block_size),
            block_size=block_size,
            max_num_sequences=num_rows,
            max_step_tokens=self._num_groups_max * MAX_MODEL_LEN,
            max_model_len=MAX_MODEL_LEN,
            trace=NullTraceSink(),
            clock=self._clock,
        )
        self._sequence_ids = count(1)
        self._token_ids = cycle(range(1, VOCAB_SIZE))
        self._groups: list[_Group] = []
        self._step = 0
        self._num_forks = 0
        self._usage: list[Usage] = []

    def serve(self, lengths: Lengths) -> UsageTable:
        """Run all requests; call it once."""
        waiting = deque(
            zip(lengths.num_prompt_tokens.tolist(), lengths.num_output_tokens.tolist(), strict=True)
        )
        while waiting or self._groups:
            self._step += 1
            plan = StepPlan(step=self._step, builds_on=self._step - 1)
            self._go_on(plan)
            while waiting and len(self._groups) < self._num_groups_max:
                self._join(plan, *waiting.popleft())
            result = self._engine.step(plan)
            assert not result.refusal, result.refusal
            assert not result.stale_ids, f"nothing to go on from: {result.stale_ids}"
        assert self._engine.account().held == 0, "blocks are held when nobody runs"
        return UsageTable.of(self._usage)

    def _join(self, plan: StepPlan, num_prompt_tokens: int, num_output_tokens: int) -> None:
        sequence_id = next(self._sequence_ids)
        token_ids = self._rng.integers(1, VOCAB_SIZE, num_prompt_tokens).tolist()
        sampling = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True, num_candidates=1)
        plan.announce.append(
            Announcement(
                sequence_id=sequence_id,
                token_ids=token_ids,
                num_prompt_tokens=num_prompt_tokens,
                sampling=sampling,
            )
        )
        plan.may.add(sequence_id, 0, num_prompt_tokens)
        self._groups.append(
            _Group(num_output_tokens - 1, replay(self._recording, self._rng), [sequence_id])
        )

    def _go_on(self, plan: StepPlan) -> None:
        """Let all groups take their next tokens; those that have theirs end."""
        staying = []
        for group in self._groups:
            if group.num_steps_left:
                group.num_steps_left -= 1
                self._branch(group, plan)
                staying.append(group)
            else:
                plan.finish += group.beam_ids
        self._groups = staying

    def _branch(self, group: _Group, plan: StepPlan) -> None:
        is_prompt = len(group.beam_ids) < self._width
        parents = [0] * self._width if is_prompt else next(group.steps)
        plan.finish += [
            beam_id for place, beam_id in enumerate(group.beam_ids) if place not in parents
        ]
        going_on: set[int] = set()
        children = []
        for place in parents:
            parent_id = group.beam_ids[place]
            child_id = next(self._sequence_ids) if parent_id in going_on else parent_id
            going_on.add(parent_id)
            children.append(child_id)
            # Each goes on with a token of its own, as the beams of a search do.
            plan.branches.add(parent_id, 0, child_id, next(self._token_ids))
        self._num_forks += len(parents) - len(going_on)
        group.beam_ids = children

    def _note_usage(self, batch: StepBatch) -> None:
        usage = read_usage(self._engine, batch)
        usage.start_ns = self._clock.now_ns()
        usage.num_copies = self._runner.take_num_copies()
        usage.num_forks, self._num_forks = self._num_forks, 0
        self._usage.append(usage)
