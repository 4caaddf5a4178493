"""The owner of block state: nobody else decides what a block is or who may have it.

    FREE ──allocate──▶ HELD ──last reference dropped──▶ FENCED ──step has finished──▶ FREE
                        │ ▲ acquire: one reference more

CACHED blocks (no reference, but in a prefix index) and QUARANTINED ones (found in two places at
once) are states of the same array. Reference counts, states and owners are NumPy columns over block
ids, so an operation costs a few array instructions however many blocks it moves. Every operation
is recorded in the trace sink, in the order in which it happened: replaying the records rebuilds the
pool.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageframe.core.errors import InternalError
from pageframe.core.step import PoolAccount
from pageframe.core.trace import KvCause, KvOperation, TraceSink
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.fence import Fence
from pageframe.executor.memory.free_list import FreeList
from pageframe.executor.memory.purpose import Purpose


@enum.unique
class BlockState(enum.IntEnum):
    """Where a block stands; each block is in exactly one state."""

    FREE = 0
    HELD = 1
    CACHED = 2
    FENCED = 3
    QUARANTINED = 4


class BlocksExhaustedError(InternalError):
    """More blocks were asked for than are free; the caller has to look first."""


class BlockNotHeldError(InternalError):
    """A reference was taken or dropped where none exists: a double free, or a late share."""


class UnknownBlockError(InternalError):
    """A block id outside the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """What is known about one block.

    Attributes:
        block_id: Which.
        state: Where it stands.
        num_references: Table entries and pins that name it.
        sequence_id: The sequence it was last allocated to or given up by; 0 when free.
        cause: Why it is in this state; None when it has been free from the start.
        since_step: The step in which it came into this state; 0 outside any step.
    """

    block_id: int
    state: BlockState
    num_references: int
    sequence_id: int
    cause: KvCause | None
    since_step: int


class BlockPool:
    """All blocks of a replica.

    Attributes:
        num_blocks: Blocks in the pool.
        states: uint8 [num_blocks], values of ``BlockState``. Read only for others.
        ref_counts: int32 [num_blocks]. Read only for others.
        current_step: Step that operations are recorded under; 0 outside any step.
    """

    def __init__(self, num_blocks: int, trace: TraceSink) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.states: NDArray[np.uint8] = np.zeros(num_blocks, dtype=np.uint8)
        self.ref_counts: Int32Array = np.zeros(num_blocks, dtype=np.int32)
        self.current_step = 0
        self._trace = trace
        self._free = FreeList(num_blocks)
        self._fence = Fence()
        self._owner_ids: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._causes: NDArray[np.uint8] = np.zeros(num_blocks, dtype=np.uint8)
        self._since_steps: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._num_by_state = [num_blocks, 0, 0, 0, 0]
        self._launched = 0
        self._completed = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks that somebody refers to."""
        return self._num_by_state[BlockState.HELD]

    @property
    def is_quiet(self) -> bool:
        """Whether no step is in flight, so that what is given up now is free at once."""
        return self._completed == self._launched

    def launch(self, step: int) -> None:
        """A step that may touch any held block is about to be launched."""
        assert step > self._launched, f"step {step} launched after {self._launched}"
        self._launched = step

    def complete(self, step: int) -> None:
        """Step ``step`` and all before it have finished: free what waited for them."""
        assert self._completed <= step <= self._launched, (
            f"step {step} completed after {self._completed}, launched {self._launched}"
        )
        self._completed = step
        self._pass_fence(has_waited=True)

    def restart(self) -> None:
        """Count steps from 1 again, for a new scheduler epoch. No step may be in flight."""
        assert self.is_quiet, f"step {self._launched} in flight, {self._completed} completed"
        self._launched = self._completed = self.current_step = 0

    def allocate(self, num_blocks: int, purpose: Purpose) -> Int32Array:
        """Take free blocks for one sequence, each with one reference: int32 [num_blocks].

        Raises:
            BlocksExhaustedError: fewer are free; nothing was changed.
        """
        block_ids = self._take(num_blocks)
        self._own(block_ids, purpose.sequence_id, purpose.cause)
        self._record(KvOperation.ALLOCATE, purpose, block_ids, self.num_free)
        return block_ids

    def allocate_each(
        self,
        sequence_ids: NDArray[np.int64],
        generations: Int32Array,
        positions: Int32Array,
        cause: KvCause,
    ) -> Int32Array:
        """Take one free block for each of n sequences: int32 [n]. All arguments are [n].

        Raises:
            BlocksExhaustedError: fewer are free; nothing was changed.
        """
        block_ids = self._take(len(sequence_ids))
        self._own(block_ids, sequence_ids, cause)
        num_free_after = self.num_free + len(block_ids)
        columns = (sequence_ids, generations, positions, block_ids)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for sequence_id, generation, position, block_id in rows:
            num_free_after -= 1
            self._trace.kv(
                KvOperation.ALLOCATE,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=self.current_step,
                block_ids=[block_id],
                num_free_after=num_free_after,
            )
        return block_ids

    def acquire(self, block_ids: Int32Array, purpose: Purpose) -> None:
        """Add one reference to each of these held blocks.

        Raises:
            BlockNotHeldError: one of them has no reference; nothing was changed.
            UnknownBlockError: an id is outside the pool; nothing was changed.
        """
        self._check_held(block_ids)
        self.ref_counts[block_ids] += 1
        self._record(KvOperation.SHARE, purpose, block_ids, self.num_free)

    def release(self, block_ids: Int32Array, purpose: Purpose) -> int:
        """Drop one reference of each; those with none left go to the fence, and on when quiet.

        Returns:
            How many blocks lost their last reference.

        Raises:
            BlockNotHeldError: one of them has no reference, or is named twice; nothing was changed.
            UnknownBlockError: an id is outside the pool; nothing was changed.
        """
        if not len(block_ids):
            return 0
        self._check_held(block_ids)
        references = self.ref_counts[block_ids] - 1
        self.ref_counts[block_ids] = references
        self._record(KvOperation.RELEASE, purpose, block_ids, self.num_free)
        dropped = block_ids[references == 0]
        if len(dropped):
            self._move(dropped, BlockState.HELD, BlockState.FENCED)
            self._causes[dropped] = purpose.cause
            self._fence.hold(dropped, self._launched, purpose)
        if self.is_quiet:
            self._pass_fence(has_waited=False)
        return len(dropped)

    def quarantine(self, block_ids: Int32Array, purpose: Purpose) -> None:
        """Take blocks out of use for good, whatever place or places they were found in."""
        self._check_known(block_ids)
        block_ids = np.unique(block_ids[self.states[block_ids] != BlockState.QUARANTINED])
        self.states[block_ids] = BlockState.QUARANTINED
        self.ref_counts[block_ids] = 0
        self._causes[block_ids] = purpose.cause
        self._since_steps[block_ids] = self.current_step
        self._free.discard(block_ids)
        self._fence.discard(block_ids)
        self.recount()
        if len(block_ids):
            self._record(KvOperation.QUARANTINE, purpose, block_ids, self.num_free)

    def recount(self) -> None:
        """Count the blocks of each state anew. Walks the pool: for faults only."""
        self._num_by_state = np.bincount(self.states, minlength=len(BlockState)).tolist()

    def account(self) -> PoolAccount:
        """Blocks by state, from running counts."""
        _, held, cached, fenced, quarantined = self._num_by_state
        return PoolAccount(
            total=self.num_blocks,
            free=len(self._free),
            held=held,
            cached=cached,
            fenced=fenced,
            quarantined=quarantined,
        )

    def explain(self, block_id: int) -> BlockFacts:
        """Who has this block, why, and since when.

        Raises:
            UnknownBlockError: the id is outside the pool.
        """
        self._check_known(np.array([block_id], dtype=np.int32))
        cause = int(self._causes[block_id])
        return BlockFacts(
            block_id=block_id,
            state=BlockState(int(self.states[block_id])),
            num_references=int(self.ref_counts[block_id]),
            sequence_id=int(self._owner_ids[block_id]),
            cause=KvCause(cause) if cause else None,
            since_step=int(self._since_steps[block_id]),
        )

    def free_ids(self) -> Int32Array:
        """A view of the free list; valid until the next change."""
        return self._free.block_ids()

    def fenced_ids(self) -> Int32Array:
        """The blocks behind the fence, in a new array."""
        return self._fence.block_ids()

    def _take(self, num_blocks: int) -> Int32Array:
        if num_blocks > self.num_free:
            raise BlocksExhaustedError(
                "BLOCKS_EXHAUSTED",
                f"{num_blocks} blocks asked for, {self.num_free} of {self.num_blocks} are free",
                num_blocks=num_blocks,
                num_free=self.num_free,
                num_total=self.num_blocks,
            )
        block_ids = self._free.pop(num_blocks)
        self._move(block_ids, BlockState.FREE, BlockState.HELD)
        self.ref_counts[block_ids] = 1
        return block_ids

    def _own(
        self, block_ids: Int32Array, owner_ids: int | NDArray[np.int64], cause: KvCause
    ) -> None:
        self._owner_ids[block_ids] = owner_ids
        self._causes[block_ids] = cause

    def _move(self, block_ids: Int32Array, source: BlockState, target: BlockState) -> None:
        self.states[block_ids] = target
        self._since_steps[block_ids] = self.current_step
        self._num_by_state[source] -= len(block_ids)
        self._num_by_state[target] += len(block_ids)

    def _pass_fence(self, *, has_waited: bool) -> None:
        for batch in self._fence.clear(self._completed):
            if not len(batch.block_ids):
                continue
            if has_waited:
                waited = batch.purpose._replace(cause=KvCause.STEP_COMPLETED)
                self._record(KvOperation.FENCE_CLEAR, waited, batch.block_ids, self.num_free)
            self._move(batch.block_ids, BlockState.FENCED, BlockState.FREE)
            self._owner_ids[batch.block_ids] = 0
            self._free.push(batch.block_ids)
            self._record(KvOperation.FREE, batch.purpose, batch.block_ids, self.num_free)

    def _check_known(self, block_ids: Int32Array) -> None:
        if len(block_ids) and (block_ids.min() < 0 or block_ids.max() >= self.num_blocks):
            raise UnknownBlockError(
                "UNKNOWN_BLOCK",
                f"blocks {block_ids.tolist()} are not all in [0, {self.num_blocks})",
                block_ids=block_ids.tolist(),
                num_total=self.num_blocks,
            )

    def _check_held(self, block_ids: Int32Array) -> None:
        self._check_known(block_ids)
        lacking = block_ids[self.ref_counts[block_ids] < 1].tolist()
        if lacking or len(set(block_ids.tolist())) != len(block_ids):
            raise BlockNotHeldError(
                "BLOCK_NOT_HELD",
                f"of blocks {block_ids.tolist()}, {lacking} have no reference, or one is twice",
                block_ids=block_ids.tolist(),
                without_reference=lacking,
            )

    def _record(
        self,
        operation: KvOperation,
        purpose: Purpose,
        block_ids: Int32Array,
        num_free_after: int,
    ) -> None:
        named: Sequence[int] = block_ids.tolist()
        self._trace.kv(
            operation,
            purpose.cause,
            sequence_id=purpose.sequence_id,
            generation=purpose.generation,
            position=purpose.position,
            step=self.current_step,
            block_ids=named,
            num_free_after=num_free_after,
        )
