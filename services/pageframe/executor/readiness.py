"""Who cannot be admitted yet, because its grammar is still being compiled.

Announcing a sequence starts the compilation, a step or more ahead of its admission; whoever comes
up before it is done is refused as not ready, and asks again with the next plan.
"""

import functools
from collections.abc import Callable, Iterator

from pageframe.core.plan import StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW

# How long a step is held up that has nothing to compute: without it, a scheduler with nothing else
# to do would ask again and again, thousands of times a second.
_WAIT_S = 0.01

Prepare = Callable[[SamplingParams, float], bool]
"""Starts what an admission would wait for; says whether it is there within so many seconds."""


FindUnready = Callable[[StepPlan, KvMemory], frozenset[int]]
"""Which sequences of a plan could not be admitted now."""


def unready_by(prepare: Prepare) -> FindUnready:
    """``unready`` for one runner."""
    return functools.partial(unready, prepare=prepare)


def unready(plan: StepPlan, memory: KvMemory, prepare: Prepare) -> frozenset[int]:
    """Ids of the plan's sequences that could not be admitted now; only looks at what is new."""
    waiting = {
        sequence_id: sampling
        for sequence_id, sampling in _comers(plan, memory)
        if sampling.grammar is not None and not prepare(sampling, 0.0)
    }
    if waiting and not len(memory.sequences.running_rows()):
        first, sampling = next(iter(waiting.items()))
        if prepare(sampling, _WAIT_S):
            del waiting[first]
    return frozenset(waiting)


def _comers(plan: StepPlan, memory: KvMemory) -> Iterator[tuple[int, SamplingParams]]:
    for announcement in plan.announce:
        yield announcement.sequence_id, announcement.sampling
    for sequence_id in plan.may.sequence_ids:
        sequence = memory.sequences.get(sequence_id)
        if sequence is not None and sequence.row == NO_ROW:
            yield sequence_id, sequence.sampling
