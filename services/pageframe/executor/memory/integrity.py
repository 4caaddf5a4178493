"""The conservation law, recomputed from nothing.

    free + held + cached + fenced + quarantined == total
    sum of reference counts == entries of block tables + pins + blocks held by transfers

The pool's running counts are believed nowhere: states are compared with what the free list, the
fence, the eviction policy, the prefix index and the block tables really hold. A block that is wrong
in any of them goes to quarantine, so that one bug costs one block and one request, not the server.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_columns import ABSENT, BlockFacts, BlockState
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.pool_upkeep import quarantine
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.retention import Retention

NO_BLOCK = -1


@enum.unique
class ViolationKind(enum.StrEnum):
    """Which part of the law is broken."""

    FREE_LIST = "free_list"
    """A block is on the free list other than exactly once when FREE and never otherwise."""
    FENCE = "fence"
    """The same for the fence and FENCED."""
    EVICTION = "eviction"
    """The same for the eviction policy and CACHED."""
    INDEX = "index"
    """A block is CACHED but cannot be found, or FREE and found, or found under another's key."""
    REFERENCES = "references"
    """The reference count differs from the table entries, pins and transfers of the block."""
    PINS = "pins"
    """The pins of the block differ from what is kept by name."""
    STATE = "state"
    """A block has references but is not HELD, or is HELD without any."""
    COUNT = "count"
    """The running count of a state, of pinned blocks or of a tenant differs from the blocks."""
    HOST = "host"
    """The host tier's books do not add up."""


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
    pool, columns = memory.pool, memory.pool.columns
    supply, states = pool.supply, pool.columns.states
    listed = (
        (ViolationKind.FREE_LIST, BlockState.FREE, supply.free_ids()),
        (ViolationKind.FENCE, BlockState.FENCED, supply.fenced_ids()),
        (ViolationKind.EVICTION, BlockState.CACHED, np.array(supply.evictable_ids(), np.int32)),
    )
    found = []
    for kind, state, block_ids in listed:
        found += _compare(kind, *_membership(pool, block_ids, state))
    sound = states != BlockState.QUARANTINED
    pins, idle_pins = _pins(memory, memory.retentions), _pins(memory, _sessions(memory))
    references = _table_references(memory) + pins
    found += _compare(ViolationKind.PINS, pins * sound, columns.pin_counts)
    found += _compare(ViolationKind.PINS, idle_pins * sound, columns.idle_pin_counts)
    found += _compare(ViolationKind.REFERENCES, references * sound, columns.ref_counts)
    is_held = (states == BlockState.HELD).astype(np.int64)
    found += _compare(ViolationKind.STATE, (columns.ref_counts > 0).astype(np.int64), is_held)
    found += _compare(ViolationKind.INDEX, *_findable(pool))
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
    violations += _count_violations(memory)
    if violations:
        broken = [violation.block_id for violation in violations if violation.block_id != NO_BLOCK]
        pool.columns.recount()
        quarantine(pool, np.array(broken, dtype=np.int32), Purpose(KvCause.INTEGRITY))
    return violations


def _table_references(memory: KvMemory) -> NDArray[np.int64]:
    """Table entries and transfers that name each block: int64 [num_blocks_max]."""
    named = memory.tables.entries[memory.tables.is_valid()]
    arriving: Int32Array = np.array(memory.transfers.arriving_ids(), dtype=np.int32)
    return np.bincount(np.concatenate([named, arriving]), minlength=memory.pool.num_blocks_max)


def _sessions(memory: KvMemory) -> list[Retention]:
    return [retention for retention in memory.retentions if retention.is_session]


def _pins(memory: KvMemory, retentions: Iterable[Retention]) -> NDArray[np.int64]:
    """Pins of each block, by what is kept by name: int64 [num_blocks_max]."""
    pinned = [block for retention in retentions for block in retention.pinned.values()]
    return np.bincount(np.array(pinned, dtype=np.int32), minlength=memory.pool.num_blocks_max)


def _findable(pool: BlockPool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """1 for each block that the index should find and does: both int64 [num_blocks_max].

    Cached blocks should be found, held ones may be, others must not.
    """
    states, is_indexed = pool.columns.states, pool.index.is_indexed
    expected = (states == BlockState.CACHED) | ((states == BlockState.HELD) & is_indexed)
    actual = is_indexed.copy()
    for block_id in np.flatnonzero(is_indexed).tolist():
        key = pool.index.key_of(block_id)
        actual[block_id] = key is not None and pool.index.block_of(key) == block_id
    return expected.astype(np.int64), actual.astype(np.int64)


def _membership(
    pool: BlockPool, listed: NDArray[np.integer], state: BlockState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each block should be listed, and how often it is: both int64 [num_blocks_max]."""
    expected = (pool.columns.states == state).astype(np.int64)
    return expected, np.bincount(listed, minlength=pool.num_blocks_max)


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


def _count_violations(memory: KvMemory) -> list[Violation]:
    columns, account = memory.pool.columns, memory.pool.account()
    counted = [(account.free, BlockState.FREE), (account.held, BlockState.HELD)]
    counted += [(account.cached, BlockState.CACHED), (account.fenced, BlockState.FENCED)]
    counted += [(account.quarantined, BlockState.QUARANTINED)]
    by_state = np.bincount(columns.states, minlength=ABSENT + 1)
    pairs = [(int(by_state[state]), num_blocks) for num_blocks, state in counted]
    pairs.append((int(by_state.sum()) - int(by_state[ABSENT]), account.total))
    pairs.append((int(np.count_nonzero(columns.pin_counts)), account.pinned))
    held = columns.tenant_ids[columns.states == BlockState.HELD]
    num_tenants = len(columns.num_held_by_tenant)
    by_tenant = np.bincount(held, minlength=num_tenants).tolist()
    pairs += zip(by_tenant, columns.num_held_by_tenant, strict=True)
    is_idle = (columns.idle_pin_counts > 0) & (columns.idle_pin_counts == columns.ref_counts)
    by_tenant = np.bincount(columns.tenant_ids[is_idle], minlength=num_tenants).tolist()
    pairs += zip(by_tenant, columns.num_yieldable_by_tenant, strict=True)
    pairs.append((sum(by_tenant), columns.num_yieldable))
    violations = [
        Violation(kind=ViolationKind.COUNT, block_id=NO_BLOCK, expected=expected, actual=actual)
        for expected, actual in pairs
        if expected != actual
    ]
    num_host_faults = len(memory.host.check())
    if num_host_faults:
        violations.append(
            Violation(
                kind=ViolationKind.HOST, block_id=NO_BLOCK, expected=0, actual=num_host_faults
            )
        )
    return violations
