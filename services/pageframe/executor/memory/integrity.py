"""The conservation law, recomputed from nothing.

    free + held + cached + fenced + quarantined == total
    sum of reference counts == entries of block tables

The pool's running counts are believed nowhere: states are compared with what the free list, the
fence and the block tables really hold. A block that is wrong in any of them goes to quarantine, so
that one bug costs one block and one request, not the server.
"""

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_pool import BlockFacts, BlockPool, BlockState
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.purpose import Purpose

NO_BLOCK = -1


@enum.unique
class ViolationKind(enum.StrEnum):
    """Which part of the law is broken."""

    FREE_LIST = "free_list"
    """A block is on the free list other than exactly once when FREE and never otherwise."""
    FENCE = "fence"
    """The same for the fence and FENCED."""
    REFERENCES = "references"
    """The reference count differs from the table entries that name the block."""
    STATE = "state"
    """A block has references but is not HELD, or is HELD without any."""
    COUNT = "count"
    """The running count of a state differs from the blocks in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One breach of the law.

    Attributes:
        kind: Which part of it.
        block_id: Which block; ``NO_BLOCK`` for a count of the whole pool.
        expected: The number that the law asks for.
        actual: The number that was found.
        sequence_ids: Running sequences whose tables name the block.
        block: The block's owner record before it went to quarantine.
    """

    kind: ViolationKind
    block_id: int
    expected: int
    actual: int
    sequence_ids: tuple[int, ...] = ()
    block: BlockFacts | None = None


def check_integrity(memory: KvMemory) -> list[Violation]:
    """Find every violation and quarantine the blocks involved. An empty list is the normal case.

    Walks the whole pool: O(num_blocks). Mutates ``memory`` only when something is wrong; running
    sequences that hold a block in quarantine have then to be ended by the caller.
    """
    pool = memory.pool
    references = _table_references(memory)
    found = _compare(ViolationKind.FREE_LIST, *_membership(pool, pool.free_ids(), BlockState.FREE))
    found += _compare(ViolationKind.FENCE, *_membership(pool, pool.fenced_ids(), BlockState.FENCED))
    sound = pool.states != BlockState.QUARANTINED
    found += _compare(ViolationKind.REFERENCES, references * sound, pool.ref_counts)
    is_held = (pool.states == BlockState.HELD).astype(np.int64)
    found += _compare(ViolationKind.STATE, (pool.ref_counts > 0).astype(np.int64), is_held)
    violations = [
        Violation(
            kind=kind,
            block_id=block_id,
            expected=expected,
            actual=actual,
            sequence_ids=_holders(memory, block_id),
            block=pool.explain(block_id),
        )
        for kind, block_id, expected, actual in found
    ]
    violations += _count_violations(pool)
    if violations:
        broken = [violation.block_id for violation in violations if violation.block_id != NO_BLOCK]
        pool.quarantine(np.array(broken, dtype=np.int32), Purpose(KvCause.INTEGRITY))
    return violations


def _table_references(memory: KvMemory) -> NDArray[np.int64]:
    """How many table entries name each block: int64 [num_blocks]."""
    tables = memory.tables
    is_valid = np.arange(tables.entries.shape[1]) < tables.num_blocks[:, np.newaxis]
    return np.bincount(tables.entries[is_valid], minlength=memory.pool.num_blocks)


def _membership(
    pool: BlockPool, listed: Int32Array, state: BlockState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each block should be listed, and how often it is: both int64 [num_blocks]."""
    expected = (pool.states == state).astype(np.int64)
    return expected, np.bincount(listed, minlength=pool.num_blocks)


def _compare(
    kind: ViolationKind, expected: NDArray[np.integer], actual: NDArray[np.integer]
) -> list[tuple[ViolationKind, int, int, int]]:
    """Differences between two columns over block ids."""
    return [
        (kind, int(block_id), int(expected[block_id]), int(actual[block_id]))
        for block_id in np.flatnonzero(expected != actual)
    ]


def _holders(memory: KvMemory, block_id: int) -> tuple[int, ...]:
    return tuple(
        int(memory.sequences.sequence_ids[row])
        for row in memory.sequences.running_rows()
        if block_id in memory.tables.blocks_of(row)
    )


def _count_violations(pool: BlockPool) -> list[Violation]:
    account = pool.account()
    counted = {
        BlockState.FREE: account.free,
        BlockState.HELD: account.held,
        BlockState.CACHED: account.cached,
        BlockState.FENCED: account.fenced,
        BlockState.QUARANTINED: account.quarantined,
    }
    actual = np.bincount(pool.states, minlength=len(BlockState))
    return [
        Violation(
            kind=ViolationKind.COUNT,
            block_id=NO_BLOCK,
            expected=int(actual[state]),
            actual=num_blocks,
        )
        for state, num_blocks in counted.items()
        if num_blocks != actual[state]
    ]
