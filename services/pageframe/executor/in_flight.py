"""Steps that have been launched and whose tokens nobody has taken in yet.

A device that works beside Python need not wait between two steps, if what the second one computes
is known before the tokens of the first: whoever merely goes on adds one token, whichever it is. So
the books are brought to where they will be, with ``NEWEST`` in place of each token that is coming,
and the next plan is applied to them.

    step k     apply ─▶ launch ─────────────────────▶ collect ─▶ take in
    step k+1               promise k ─▶ apply ─▶ launch ─────────────────────▶ collect ─▶ take in
    device            [          k          ][              k+1              ]

Who turns out to have ended with its token of step k is still in step k+1. What that yields for it
is dropped: at most one token of each request (law 2).
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageframe.executor.batch import NEWEST, Flight, Int32Array, StepBatch, StepOutput
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.finish import FinishRules
from pageframe.executor.memory.apply import AppliedStep
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import SequenceTable
from pageframe.executor.reporting import only_rows
from pageframe.executor.step_failure import StepFailedError

_NOBODY: Int64Array = np.empty(0, dtype=np.int64)


@dataclass(slots=True, kw_only=True)
class StepInFlight:
    """A plan that has been applied.

    Attributes:
        applied: What it came to.
        start_ns: When applying it began.
        follows: Whether it was launched before the one before it was collected.
        launch_ns: When applying it ended.
        batch: What it computes; None where the plan was refused.
        sequence_ids: int64 [S], whose rows these are; the executor may forget them meanwhile.
        flight: The runner's; None where that has failed to launch it, or nobody is in it.
        error: Why it could not be launched; None where it could.
        failure: Why it failed, by who waited for it; None where it did not.
        has_moves: Whether blocks were moved for it.
        is_complete: Whether blocks that it uses may be used again behind it.
    """

    applied: AppliedStep
    start_ns: int
    follows: bool
    launch_ns: int = 0
    batch: StepBatch | None = None
    sequence_ids: Int64Array = field(default_factory=lambda: _NOBODY)
    flight: Flight | None = None
    error: Exception | None = None
    failure: StepFailedError | None = None
    has_moves: bool = False
    is_complete: bool = True

    @property
    def is_under_way(self) -> bool:
        """Whether a device computes it, for all that is known."""
        return self.flight is not None and self.flight.is_ahead

    @property
    def is_idle(self) -> bool:
        """Whether there was nothing to launch."""
        return self.flight is None and self.error is None and not self.has_moves

    def is_known(self, sequences: SequenceTable) -> NDArray[np.bool_]:
        """Who of its batch is still in its row: bool [S]."""
        assert self.batch is not None, "a refused plan has no batch"
        is_known: NDArray[np.bool_] = sequences.sequence_ids[self.batch.rows] == self.sequence_ids
        return is_known

    def without_ended(
        self, output: StepOutput, sequences: SequenceTable
    ) -> tuple[StepBatch, StepOutput]:
        """The step as if those had not been in it who ended with the token before."""
        assert self.batch is not None, "a refused plan has no batch"
        if not self.follows:
            return self.batch, output
        is_known = self.is_known(sequences)
        if is_known.all():
            return self.batch, output
        return only_rows(self.batch, output, is_known)


def is_foreseen(step: StepInFlight, memory: KvMemory) -> bool:
    """Whether all that the step will change in the books is known but for its tokens.

    A search goes on from what was sampled, drafts may be rejected, and blocks that go to the host
    tier go by moves.
    """
    applied = step.applied
    is_search = applied.forks or applied.branched.rows
    if is_search or applied.drafts or step.has_moves or memory.options.num_host_slots:
        return False
    return not memory.sequences.is_steered[list(applied.named_rows)].any()


def can_be_followed(step: StepInFlight) -> bool:
    """Whether the next step may be launched before this one is collected."""
    return step.is_under_way and step.is_complete


def has_room_to_follow(memory: KvMemory) -> bool:
    """Whether every sequence that runs could have a block more, twice.

    Once for the plan to be applied, once for the next: the scheduler counts what it does not know
    of yet as given away.
    """
    rows, num_blocks_each = memory.sequences.running_rows(), 2 * memory.options.num_groups
    num_available = memory.pool.num_available
    if memory.quotas.is_empty:
        return num_available >= len(rows) * num_blocks_each
    tenant_ids, num_rows = np.unique(memory.sequences.tenant_ids[rows], return_counts=True)
    names = map(memory.pool.tenants.name_of, tenant_ids.tolist())
    wanted = dict(zip(names, (num_rows * num_blocks_each).tolist(), strict=True))
    return memory.quotas.have_room(wanted, num_available, memory.num_held_by_tenant())


def promise(step: StepInFlight, sequences: SequenceTable, rules: FinishRules) -> None:
    """Bring the books to where the step will bring them, but for its tokens.

    Whoever ends by its length gets none: it does not go on.
    """
    assert step.batch is not None, "a refused plan promises nothing"
    batch = step.batch
    if step.follows and not (is_known := step.is_known(sequences)).all():
        batch, _ = only_rows(batch, StepOutput(token_ids=_no_tokens(batch)), is_known)
    sequences.num_computed[batch.rows] = batch.context_lens
    rows, positions = batch.sample_rows, batch.sample_positions
    goes_on = rules.num_tokens_left(rows, positions + 1) > 0
    rows, positions = rows[goes_on], positions[goes_on]
    sequences.put_tokens(rows, positions, np.full(len(rows), NEWEST, dtype=np.int32))


def _no_tokens(batch: StepBatch) -> Int32Array:
    return np.empty(len(batch.samples), dtype=np.int32)
