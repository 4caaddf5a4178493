"""Where blocks come from and where they go: the free list, the cache and the fence before them.

    take ◀── FREE ◀── fence ◀── FENCED ◀── evict ── CACHED
                                  ▲                    ▲
                              fence_off              cache      last reference dropped

A block that somebody may still look for by its prefix is *cached*: spare, but not yet free. Both
kinds are available, so taking blocks evicts what the free list lacks.
"""

from collections.abc import Callable, Container

import numpy as np

from pageframe.core.errors import InternalError
from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_columns import ABSENT, BlockColumns, BlockState
from pageframe.executor.memory.eviction import EvictionPolicy
from pageframe.executor.memory.fence import Fence
from pageframe.executor.memory.free_list import FreeList
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.recorder import OperationRecorder


class BlocksExhaustedError(InternalError):
    """More blocks were asked for than can be had; the caller has to look first."""


class BlockSupply:
    """Blocks that nobody refers to.

    Attributes:
        on_shortage: Called with a number of blocks that are lacking, and the tenants that need
            them; may make some available.
        before_evict: Called with cached blocks that are about to be given up, still indexed, and
            for whom.
    """

    def __init__(
        self,
        num_blocks: int,
        columns: BlockColumns,
        index: PrefixIndex,
        eviction: EvictionPolicy,
        recorder: OperationRecorder,
    ) -> None:
        self.on_shortage: Callable[[int, Container[int]], None] = _ignore
        self.before_evict: Callable[[list[int], Purpose], None] = _do_nothing
        self._columns = columns
        self._index = index
        self._eviction = eviction
        self._recorder = recorder
        self._free = FreeList(num_blocks, len(columns.states))
        self._fence = Fence()
        self._launched = 0
        self._completed = 0

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        if self._completed != self._launched:
            return len(self._free)  # An evicted block comes free when the step has finished.
        return len(self._free) + len(self._eviction)

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
        """Count steps from 1 again. No step may be in flight."""
        assert self.is_quiet, f"step {self._launched} in flight, {self._completed} completed"
        self._launched = self._completed = 0

    def take(self, num_blocks: int, tenant_ids: int | Int32Array, purpose: Purpose) -> Int64Array:
        """Take blocks, each with one reference: int64 [num_blocks]; evicts what is lacking.

        Raises:
            BlocksExhaustedError: fewer can be had; nothing was changed.
        """
        if num_blocks > len(self._free):
            self._make_room(num_blocks, tenant_ids, purpose)
        block_ids = self._free.pop(num_blocks)
        self._columns.tenant_ids[block_ids] = tenant_ids
        self._move(block_ids, BlockState.FREE, BlockState.HELD)
        self._columns.ref_counts[block_ids] = 1
        return block_ids

    def _make_room(self, num_blocks: int, tenant_ids: int | Int32Array, purpose: Purpose) -> None:
        """Have so many blocks on the free list."""
        num_short = num_blocks - self.num_available
        if num_short > 0:
            named = {tenant_ids} if isinstance(tenant_ids, int) else set(tenant_ids.tolist())
            self.on_shortage(num_short, named)
        self.check_available(num_blocks)
        num_lacking = num_blocks - len(self._free)
        if num_lacking > 0:
            self.evict(num_lacking, purpose._replace(cause=KvCause.POOL_PRESSURE))

    def check_available(self, num_blocks: int) -> None:
        """Refuse if fewer than ``num_blocks`` can be taken.

        Raises:
            BlocksExhaustedError: with the numbers.
        """
        if num_blocks > self.num_available:
            raise BlocksExhaustedError(
                "BLOCKS_EXHAUSTED",
                f"{num_blocks} blocks asked for, {self.num_available} are free or cached",
                num_blocks=num_blocks,
                num_available=self.num_available,
            )

    def cache(self, block_ids: Int64Array) -> None:
        """Keep held blocks without references until they are taken up again or evicted.

        They are in the order of their chain.
        """
        if len(block_ids):
            self._move(block_ids, BlockState.HELD, BlockState.CACHED)
            named = block_ids.tolist()
            parent = self._index.block_before(named[0])
            self._eviction.insert(named, self._columns.depths[block_ids].tolist(), parent)

    def take_up(self, block_ids: Int64Array) -> None:
        """Cached blocks are held again; the caller counts the reference."""
        self._move(block_ids, BlockState.CACHED, BlockState.HELD)
        for block_id in block_ids.tolist():
            self._eviction.discard(block_id)

    def fence_off(self, block_ids: Int64Array, source: BlockState, purpose: Purpose) -> None:
        """Blocks in state ``source`` become free once no step in flight may touch them."""
        if len(block_ids):
            self._move(block_ids, source, BlockState.FENCED)
            self._fence.hold(block_ids, self._launched, purpose)
            if self.is_quiet:
                self._pass_fence(has_waited=False)

    def evict(self, num_blocks: int, purpose: Purpose) -> int:
        """Give up cached blocks, as the eviction policy chooses; returns how many there were."""
        victims = self._eviction.take(num_blocks)
        if victims:
            self.before_evict(victims, purpose)
            for block_id in victims:
                self._index.remove(block_id)
            self._recorder.record(KvOperation.EVICT, purpose, victims)
            block_ids: Int64Array = np.array(victims, dtype=np.int64)
            self._columns.causes[block_ids] = purpose.cause
            self.fence_off(block_ids, BlockState.CACHED, purpose)
        return len(victims)

    def lowest_free(self, num_blocks: int, end: int) -> Int64Array:
        """Free blocks below ``end``, lowest first: int64 [num_blocks]. Walks the free list."""
        free = self._free.block_ids()
        lowest = np.sort(free[free < end])[:num_blocks]
        assert len(lowest) == num_blocks, f"{len(lowest)} free blocks for {num_blocks}"
        return lowest

    def swap_places(self, sources: Int64Array, targets: Int64Array) -> None:
        """Held or cached blocks take the places of free ones; both int64 [n].

        The sources are on the free list then. Walks the free list.
        """
        self._free.discard(targets)
        # Held ones too: a policy may remember how often a block was found.
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._eviction.move(source, target)
        self._columns.follow(sources, targets)
        self._free.push(sources)

    def open(self, block_ids: Int64Array) -> None:
        """Blocks that were not in the pool are free now; the first is taken first."""
        self._columns.states[block_ids] = BlockState.FREE
        self._columns.owner_ids[block_ids] = 0
        self._free.push(block_ids[::-1])

    def close(self, block_ids: Int64Array) -> None:
        """Free or broken blocks leave the pool."""
        states = self._columns.states[block_ids]
        is_empty = (states == BlockState.FREE) | (states == BlockState.QUARANTINED)
        assert is_empty.all(), f"blocks {block_ids[~is_empty].tolist()} are in use"
        self._free.discard(block_ids)
        self._columns.states[block_ids] = ABSENT

    def discard(self, block_ids: Int64Array) -> None:
        """Forget blocks wherever they wait. For faults only."""
        self._free.discard(block_ids)
        self._fence.discard(block_ids)
        for block_id in block_ids.tolist():
            if block_id in self._eviction:
                self._eviction.discard(block_id)

    def free_ids(self) -> Int64Array:
        """A view of the free list; valid until the next change."""
        return self._free.block_ids()

    def fenced_ids(self) -> Int64Array:
        """The blocks behind the fence, in a new array."""
        return self._fence.block_ids()

    def evictable_ids(self) -> list[int]:
        """Cached blocks, the one that goes next first. Walks them: for checks and for people."""
        return self._eviction.upcoming(len(self._eviction))

    def _move(self, block_ids: Int64Array, source: BlockState, target: BlockState) -> None:
        self._columns.move(block_ids, source, target, self._recorder.step)

    def _pass_fence(self, *, has_waited: bool) -> None:
        for batch in self._fence.clear(self._completed):
            if not len(batch.block_ids):
                continue
            named = batch.block_ids.tolist()
            if has_waited:
                waited = batch.purpose._replace(cause=KvCause.STEP_COMPLETED)
                self._recorder.record(KvOperation.FENCE_CLEAR, waited, named)
            self._move(batch.block_ids, BlockState.FENCED, BlockState.FREE)
            self._columns.owner_ids[batch.block_ids] = 0
            self._free.push(batch.block_ids)
            self._recorder.record(KvOperation.FREE, batch.purpose, named)


def _ignore(num_blocks: int, tenant_ids: Container[int]) -> None:
    """Nobody gives way."""


def _do_nothing(block_ids: list[int], purpose: Purpose) -> None:
    """Nobody keeps what is evicted."""
