"""Whatever a plan says, applying it keeps the laws, and the same plan has the same effect."""

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from pageframe.core.plan import Entries, Recovery, StepPlan, Victims
from pageframe.core.trace import KvCause
from pageframe.executor.memory.apply import apply
from pageframe.executor.memory.integrity import check_integrity
from unit.memory.memories import Harness, announcement

IDS = st.integers(1, 6)
GENERATIONS = st.integers(0, 2)
ROWS = st.lists(st.tuples(IDS, GENERATIONS, st.integers(-1, 40)), max_size=6)


@st.composite
def plan_parts(draw: st.DrawFn) -> dict:
    """Everything in a plan but its numbers; sequences may be known or not, fresh or stale."""
    must, may, chosen = Entries(), Entries(), Victims()
    for row in draw(ROWS):
        must.add(*row)
    for row in draw(ROWS):
        may.add(*row)
    for sequence_id, generation, _ in draw(ROWS):
        chosen.add(sequence_id, generation, Recovery.RECOMPUTE)
    announced = draw(st.lists(st.tuples(IDS, GENERATIONS, st.integers(0, 70)), max_size=3))
    return {
        "announce": [
            announcement(sequence_id, num_tokens, generation=generation)
            for sequence_id, generation, num_tokens in announced
        ],
        "finish": draw(st.lists(IDS, max_size=1)),
        "must": must,
        "victims": chosen,
        "may": may,
    }


@settings(max_examples=150, deadline=None, print_blob=True)
@given(
    plans=st.lists(plan_parts(), min_size=1, max_size=12),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(1, 24),
)
def test_any_plan_keeps_conservation_and_serves_exactly_what_it_took(plans, block_size, num_blocks):
    harness = Harness(num_blocks=num_blocks, block_size=block_size, num_rows=3)
    for parts in plans:
        before = harness.snapshot()
        twin = copy.deepcopy(harness)
        plan = StepPlan(
            step=harness.memory.last_received_step + 1,
            builds_on=harness.memory.last_applied_step,
            **parts,
        )
        applied = apply(harness.memory, plan, harness.bounds)
        assert apply(twin.memory, plan, twin.bounds).result == applied.result
        assert twin.snapshot() == harness.snapshot()
        assert check_integrity(harness.memory) == []
        if applied.result.refusal:
            assert harness.snapshot() == before
            continue
        _assert_ready(harness, applied)
        _compute(harness, applied)


def _assert_ready(harness, applied) -> None:
    """Every row that runs has the blocks it writes to, and none that it will not reach."""
    memory, block_size = harness.memory, harness.memory.tables.block_size
    assert applied.num_tokens <= harness.bounds.max_step_tokens
    assert not set(applied.decode_rows.tolist()) & applied.chunks.keys()
    num_new = dict.fromkeys(applied.decode_rows.tolist(), 1) | applied.chunks
    running = memory.sequences.running_rows().tolist()
    assert num_new.keys() <= set(running)
    assert applied.named_rows <= num_new.keys()
    for row in running:
        end = int(memory.sequences.num_computed[row]) + num_new.get(row, 0)
        assert end <= memory.sequences.num_tokens[row]
        assert memory.tables.num_blocks[row] == -(-end // block_size)


def _compute(harness, applied) -> None:
    """Pretend that the step ran; sequences that reach the model's length end."""
    sequences = harness.memory.sequences
    for row in applied.decode_rows.tolist():
        sequences.num_computed[row] += 1
    for row, num_tokens in applied.chunks.items():
        sequences.num_computed[row] += num_tokens
    rows = sequences.running_rows()
    rows = rows[sequences.num_computed[rows] == sequences.num_tokens[rows]].copy()
    sequences.append_tokens(rows, rows)
    for row in rows[sequences.num_tokens[rows] >= 64].tolist():
        harness.memory.forget(sequences.at_row(row), KvCause.FINISHED)
