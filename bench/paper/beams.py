"""Beam searches over the real engine and KV memory, with recorded ancestry.

The scheduler has no part in this: plans are written here, as a beam group's would be. In each step
all beams of all groups take a token; then, by the recording,

    parents  0  0  2      beam 0 is forked, beam 1 ends, beam 2 goes on
             │  │  │
    beams    0  1  2

A fork shares all blocks of its parent. The next step copies a shared block that is partly filled
before it is written. Dropped beams end with the next plan, before anything is allocated.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from bench.paper.ancestry import Parents, replay
from bench.paper.cost_model import CostModel
from bench.paper.lengths import MAX_MODEL_LEN, Lengths
from bench.paper.metering import VOCAB_SIZE, MeteredRunner, read_usage
from bench.paper.run_log import Usage, UsageTable
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, Fork, StepPlan
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
        num_output_left: Tokens that each beam still takes.
        steps: Parents of every step to come.
        beam_ids: Sequences, by place in the beam; at first the prompt alone.
        dropped_ids: To be ended by the next plan.
    """

    num_output_left: int
    steps: Iterator[list[int]]
    beam_ids: list[int]
    dropped_ids: list[int] = field(default_factory=list)


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
        # Forks come before the dropped beams are ended.
        num_rows = self._num_groups_max * 2 * width
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
            while waiting and len(self._groups) < self._num_groups_max:
                self._join(plan, *waiting.popleft())
            self._choose(plan)
            result = self._engine.step(plan)
            assert not result.refusal, result.refusal
            assert not result.unforked_ids, f"not forked: {result.unforked_ids}"
        assert self._engine.account().held == 0, "blocks are held when nobody runs"
        return UsageTable.of(self._usage)

    def _join(self, plan: StepPlan, num_prompt_tokens: int, num_output_tokens: int) -> None:
        sequence_id = next(self._sequence_ids)
        token_ids = self._rng.integers(1, VOCAB_SIZE, num_prompt_tokens).tolist()
        sampling = SamplingParams(
            max_tokens=num_output_tokens, ignore_eos=True, temperature=1.0, seed=sequence_id
        )
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
            _Group(num_output_tokens, replay(self._recording, self._rng), [sequence_id])
        )

    def _choose(self, plan: StepPlan) -> None:
        """Decide who survives the step of ``plan``; its last token ends a whole group."""
        staying = []
        for group in self._groups:
            plan.finish += group.dropped_ids
            group.dropped_ids = []
            group.num_output_left -= 1
            if group.num_output_left:
                self._survive(group, plan)
                staying.append(group)
        self._groups = staying

    def _survive(self, group: _Group, plan: StepPlan) -> None:
        is_prompt = len(group.beam_ids) < self._width
        parents = [0] * self._width if is_prompt else next(group.steps)
        num_children = Counter(parents)
        group.dropped_ids = [
            beam_id for place, beam_id in enumerate(group.beam_ids) if not num_children[place]
        ]
        children: dict[int, list[int]] = {}
        for place, number in num_children.items():
            new_ids = [next(self._sequence_ids) for _ in range(number - 1)]
            parent_id = group.beam_ids[place]
            children[place] = [parent_id, *new_ids]
            self._num_forks += len(new_ids)
            if new_ids:
                # Another sample index is another token, so beams differ as they do in a search.
                plan.forks.append(
                    Fork(
                        parent_id=parent_id,
                        generation=0,
                        child_ids=new_ids,
                        sample_indices=new_ids,
                        span_ids=[0] * len(new_ids),
                    )
                )
        group.beam_ids = [children[place].pop(0) for place in parents]

    def _note_usage(self, batch: StepBatch) -> None:
        usage = read_usage(self._engine, batch)
        usage.start_ns = self._clock.now_ns()
        usage.num_copies = self._runner.take_num_copies()
        usage.num_forks, self._num_forks = self._num_forks, 0
        self._usage.append(usage)
