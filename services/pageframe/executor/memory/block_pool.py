"""The owner of block state: nobody else decides what a block is or who may have it.

    FREE ──allocate──▶ HELD ──last reference dropped──▶ CACHED ──evict──▶ FENCED ──▶ FREE
                        │ ▲ acquire: one reference       if indexed,         ▲ a step that may touch
                        │ └──────────── more ◀───────────── else ────────────┘ it has finished

References are entries of block tables and pins. QUARANTINED blocks were found in two places at
once. Every operation is recorded in the trace sink, in the order in which it happened: replaying
the records rebuilds the pool.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from pageframe.core.replica import PoolAccount
from pageframe.core.trace import KvCause, KvOperation, TraceSink
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_columns import (
    BlockColumns,
    BlockFacts,
    BlockState,
    Tenants,
)
from pageframe.executor.memory.block_keys import BlockKey
from pageframe.executor.memory.block_supply import BlockSupply
from pageframe.executor.memory.eviction import EvictionPolicy
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.recorder import OperationRecorder

# As plain numbers: to compare an array with a member of an enumeration costs 5 µs more.
_HELD, _CACHED = int(BlockState.HELD), int(BlockState.CACHED)


class BlockPool:
    """All blocks of a replica.

    Args:
        num_blocks: Blocks in the pool.
        trace: Takes a record of every operation.
        index: Empty, for at least ``num_blocks_max`` blocks.
        eviction: Chooses among cached blocks; empty.
        num_blocks_max: Blocks that it may grow to; 0 for no more than it has.

    Attributes:
        num_blocks: Blocks in the pool now.
        columns: What is known of each block. Read only for others.
        index: Which blocks hold which prefix. Read only for others.
        tenants: Numbers of tenants.
        supply: Spare blocks. Read only for others.
        recorder: Where operations are recorded.
    """

    def __init__(
        self,
        num_blocks: int,
        trace: TraceSink,
        *,
        index: PrefixIndex,
        eviction: EvictionPolicy,
        num_blocks_max: int = 0,
    ) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.columns = BlockColumns(num_blocks, max(num_blocks, num_blocks_max))
        self.index = index
        self.tenants = Tenants()
        self.recorder = OperationRecorder(trace, self._count_free)
        self.supply = BlockSupply(num_blocks, self.columns, index, eviction, self.recorder)

    @property
    def current_step(self) -> int:
        """Step that operations are recorded under; 0 outside any step."""
        return self.recorder.step

    @current_step.setter
    def current_step(self, step: int) -> None:
        self.recorder.step = step

    @property
    def num_blocks_max(self) -> int:
        """Blocks that the pool may grow to."""
        return len(self.columns.states)

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return self.supply.num_free

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return self.supply.num_available

    @property
    def num_held(self) -> int:
        """Blocks that somebody refers to."""
        return self.columns.num_by_state[BlockState.HELD]

    @property
    def num_pinned(self) -> int:
        """Held blocks that have at least one pin."""
        return self.columns.num_pinned

    @property
    def is_quiet(self) -> bool:
        """Whether no step is in flight, so that what is given up now is free at once."""
        return self.supply.is_quiet

    def on_evict(self, before_evict: Callable[[list[int], Purpose], None]) -> None:
        """Have ``before_evict`` called with cached blocks about to be given up, and for whom."""
        self.supply.before_evict = before_evict

    def launch(self, step: int) -> None:
        """A step that may touch any held block is about to be launched."""
        self.supply.launch(step)

    def complete(self, step: int) -> None:
        """Step ``step`` and all before it have finished: free what waited for them."""
        self.supply.complete(step)

    def restart(self) -> None:
        """Count steps from 1 again, for a new scheduler epoch. No step may be in flight."""
        self.supply.restart()
        self.current_step = 0

    def allocate(self, num_blocks: int, purpose: Purpose) -> Int64Array:
        """Take blocks for one sequence, each with one reference: int64 [num_blocks].

        Evicts what is lacking on the free list.

        Raises:
            BlocksExhaustedError: fewer can be had; nothing was changed.
        """
        block_ids = self.supply.take(num_blocks, purpose.tenant_id, purpose)
        self.columns.owner_ids[block_ids] = purpose.sequence_id
        self.columns.causes[block_ids] = purpose.cause
        self.recorder.record(KvOperation.ALLOCATE, purpose, block_ids.tolist())
        return block_ids

    def allocate_each(
        self,
        sequence_ids: NDArray[np.int64],
        generations: Int32Array,
        positions: Int32Array,
        tenant_ids: Int32Array,
        cause: KvCause,
    ) -> Int64Array:
        """Take one block for each of n sequences: int64 [n]. All arrays are [n].

        Raises:
            BlocksExhaustedError: fewer can be had; nothing was changed.
        """
        block_ids = self.supply.take(len(sequence_ids), tenant_ids, Purpose(cause))
        self.columns.owner_ids[block_ids] = sequence_ids
        self.columns.causes[block_ids] = cause
        rows = _rows_of(sequence_ids, generations, positions)
        self.recorder.record_allocated_each(cause, rows, block_ids.tolist())
        return block_ids

    def acquire(self, block_ids: NDArray[np.integer], purpose: Purpose) -> None:
        """Add one reference to each of these held or cached blocks.

        Raises:
            BlockNotHeldError: one is neither held nor cached, or is named twice; nothing changed.
            UnknownBlockError: an id is outside the pool; nothing was changed.
        """
        ids = self._take_up(block_ids, purpose)
        self.columns.refer(ids, 1)
        self.recorder.record(KvOperation.SHARE, purpose, ids.tolist())

    def copy_each(
        self,
        sources: Sequence[int],
        sequence_ids: NDArray[np.int64],
        generations: Int32Array,
        positions: Int32Array,
        tenant_ids: Int32Array,
        cause: KvCause,
    ) -> Int64Array:
        """Replace one held block each of n sequences by a copy: int64 [n], where each copy goes.

        One reference moves from each source to its target. A source may be named several times, if
        it has as many references. All arrays are [n].

        Raises:
            BlocksExhaustedError: too few can be had; nothing was changed.
        """
        targets = self.allocate_each(sequence_ids, generations, positions, tenant_ids, cause)
        dropped = self.columns.drop_each(sources)
        rows = _rows_of(sequence_ids, generations, positions)
        self.recorder.record_copied_each(cause, rows, sources, targets.tolist())
        if dropped:
            self._let_go(np.array(dropped, dtype=np.int64), Purpose(cause))
        return targets

    def release(self, block_ids: NDArray[np.integer], purpose: Purpose) -> int:
        """Drop one reference of each; they are in the order of their chain.

        Those with none left are cached if they are indexed, else they go to the fence, and on
        when quiet.

        Returns:
            How many blocks lost their last reference.

        Raises:
            BlockNotHeldError: one of them has no reference, or is named twice; nothing was changed.
            UnknownBlockError: an id is outside the pool; nothing was changed.
        """
        if not len(block_ids):
            return 0
        ids = self._check_referred(block_ids)
        self.columns.refer(ids, -1)
        return self._drop(ids, KvOperation.RELEASE, purpose)

    def pin(self, block_ids: NDArray[np.integer], purpose: Purpose, *, is_idle: bool) -> None:
        """Add a reference to each that no block table stands for; errors as for ``acquire``.

        ``is_idle`` says that it gives way while somebody runs; ``unpin`` has to say the same.
        """
        ids = self._take_up(block_ids, purpose)
        self.columns.pin(ids, 1, is_idle=is_idle)
        self.recorder.record(KvOperation.PIN, purpose, ids.tolist())

    def unpin(self, block_ids: NDArray[np.integer], purpose: Purpose, *, is_idle: bool) -> int:
        """Take back one pin of each, in the order of their chain; else as ``release``."""
        columns = self.columns
        assert (columns.pin_counts[block_ids] > 0).all(), f"not all pinned: {block_ids}"
        ids = self._check_referred(block_ids)
        columns.pin(ids, -1, is_idle=is_idle)
        return self._drop(ids, KvOperation.UNPIN, purpose)

    def publish(
        self,
        block_ids: NDArray[np.integer],
        keys: Sequence[BlockKey],
        parents: Sequence[BlockKey],
        token_ids: Sequence[bytes],
        depths: NDArray[np.integer],
        groups: int | NDArray[np.integer] | None = None,
    ) -> list[int]:
        """Enter held blocks into the prefix index; record it with ``record_published``.

        Blocks that are in it already, or not held, and those whose content another block has, are
        passed over.

        Args:
            block_ids: [n].
            keys: Theirs.
            parents: The key before each.
            token_ids: Tokens of each as bytes; empty under a private key.
            depths: [n], logical index of each.
            groups: Whose layers they hold, all of them or [n]; None where there is one group.

        Returns:
            Those that were entered, in order.
        """
        columns, block_ids = self.columns, _as_index(block_ids)
        columns.depths[block_ids] = depths
        if groups is not None:
            columns.groups[block_ids] = groups
        entered = block_ids.tolist()
        if columns.num_by_state[BlockState.QUARANTINED]:
            # One that was lost may still stand in the table of a sequence that is about to end.
            is_held = (columns.states[block_ids] == _HELD).tolist()
            entered, keys, parents, token_ids = (
                list(compress(column, is_held)) for column in (entered, keys, parents, token_ids)
            )
        return self.index.add_each(entered, keys, parents, token_ids)

    def record_published(self, block_ids: Sequence[int], purpose: Purpose) -> None:
        """Record that blocks were entered into the index, one record for many."""
        self.recorder.record(KvOperation.INDEX, purpose, block_ids)

    def unpublish(self, block_ids: NDArray[np.integer], purpose: Purpose) -> None:
        """Take held blocks out of the prefix index; those that are not in it are passed over."""
        block_ids = _as_index(block_ids)
        indexed = block_ids[self.index.is_indexed[block_ids]].tolist()
        for block_id in indexed:
            assert self.columns.states[block_id] == BlockState.HELD, f"{block_id} is not held"
            self.index.remove(block_id)
        if indexed:
            self.recorder.record(KvOperation.UNINDEX, purpose, indexed)

    def evict(self, num_blocks: int, purpose: Purpose) -> int:
        """Give up cached blocks, as the eviction policy chooses; returns how many there were."""
        return self.supply.evict(num_blocks, purpose)

    def account(
        self, *, num_yieldable: int = 0, num_host_total: int = 0, num_host_used: int = 0
    ) -> PoolAccount:
        """Blocks by state, from running counts; what the pool does not know is the caller's."""
        _, held, cached, fenced, quarantined, _ = self.columns.num_by_state
        return PoolAccount(
            total=self.num_blocks,
            free=self.num_free,
            held=held,
            cached=cached,
            fenced=fenced,
            quarantined=quarantined,
            pinned=self.columns.num_pinned,
            yieldable=num_yieldable,
            host_total=num_host_total,
            host_used=num_host_used,
        )

    def explain(self, block_id: int) -> BlockFacts:
        """Who has this block, why, and since when.

        Raises:
            UnknownBlockError: the id is outside the pool.
        """
        columns = self.columns
        columns.check_known(np.array([block_id], dtype=np.int64), self.num_blocks)
        cause = int(columns.causes[block_id])
        return BlockFacts(
            block_id=block_id,
            state=BlockState(int(columns.states[block_id])),
            num_references=int(columns.ref_counts[block_id]),
            num_pins=int(columns.pin_counts[block_id]),
            is_indexed=bool(self.index.is_indexed[block_id]),
            sequence_id=int(columns.owner_ids[block_id]),
            tenant=self.tenants.name_of(int(columns.tenant_ids[block_id])),
            cause=KvCause(cause) if cause else None,
            since_step=int(columns.since_steps[block_id]),
        )

    def _count_free(self) -> int:
        return self.supply.num_free

    def _take_up(self, block_ids: NDArray[np.integer], purpose: Purpose) -> Int64Array:
        """Each of these held or cached blocks is held; the caller counts the reference."""
        columns, ids = self.columns, _as_index(block_ids)
        columns.check_known(ids, self.num_blocks)
        is_cached = columns.states[ids] == _CACHED
        columns.check_held(ids, is_cached)
        cached = ids[is_cached]
        if len(cached):
            columns.tenant_ids[cached] = purpose.tenant_id
            columns.causes[cached] = purpose.cause
            self.supply.take_up(cached)
        return ids

    def _check_referred(self, block_ids: NDArray[np.integer]) -> Int64Array:
        ids = _as_index(block_ids)
        self.columns.check_known(ids, self.num_blocks)
        self.columns.check_held(ids)
        return ids

    def _drop(self, block_ids: Int64Array, operation: KvOperation, purpose: Purpose) -> int:
        """A reference of each was dropped; returns how many have none left."""
        self.recorder.record(operation, purpose, block_ids.tolist())
        dropped = block_ids[self.columns.ref_counts[block_ids] == 0]
        if len(dropped):
            self._let_go(dropped, purpose)
        return len(dropped)

    def _let_go(self, block_ids: Int64Array, purpose: Purpose) -> None:
        """Nobody refers to these held blocks any more; they are in the order of their chain."""
        self.columns.causes[block_ids] = purpose.cause
        is_indexed = self.index.is_indexed[block_ids]
        self.supply.cache(block_ids[is_indexed])
        self.supply.fence_off(block_ids[~is_indexed], BlockState.HELD, purpose)


def _as_index(block_ids: NDArray[np.integer]) -> Int64Array:
    return block_ids.astype(np.int64, copy=False)


def _rows_of(
    sequence_ids: NDArray[np.int64], generations: Int32Array, positions: Int32Array
) -> Iterable[tuple[int, int, int]]:
    return zip(sequence_ids.tolist(), generations.tolist(), positions.tolist(), strict=True)
