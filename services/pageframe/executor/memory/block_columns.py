"""What is known of each block, as NumPy columns over block ids, with running counts.

The simple thing is an object per block; moving a thousand of them would cost a thousand attribute
writes. Here a change of state is one array assignment for all blocks that change together, and the
counts by state and by tenant are kept on the way, so nobody ever walks the pool to know them.
Block ids come as int64, which is what NumPy indexes by; see ``free_list``.
"""

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageframe.core.errors import InternalError
from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array


@enum.unique
class BlockState(enum.IntEnum):
    """Where a block stands; each block is in exactly one state."""

    FREE = 0
    HELD = 1
    CACHED = 2
    FENCED = 3
    QUARANTINED = 4


ABSENT = len(BlockState)
"""What the column of states says of reserved addresses behind the end of the pool."""


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
        num_pins: How many of the references are pins.
        is_indexed: Whether the prefix index names it.
        sequence_id: The sequence it was last allocated to or given up by; 0 when free.
        tenant: Who is, or was last, charged for it.
        cause: Why it is in this state; None when it has been free from the start.
        since_step: The step in which it came into this state; 0 outside any step.
    """

    block_id: int
    state: BlockState
    num_references: int
    num_pins: int
    is_indexed: bool
    sequence_id: int
    tenant: str
    cause: KvCause | None
    since_step: int


class Tenants:
    """Small numbers for the names of tenants; 0 is nobody."""

    def __init__(self) -> None:
        self._names = [""]
        self._ids = {"": 0}

    def __len__(self) -> int:
        return len(self._names)

    def id_of(self, name: str) -> int:
        """The tenant's number, given out at first sight."""
        tenant_id = self._ids.get(name)
        if tenant_id is None:
            tenant_id = self._ids[name] = len(self._names)
            self._names.append(name)
        return tenant_id

    def name_of(self, tenant_id: int) -> str:
        """The tenant's name."""
        return self._names[tenant_id]

    def known_id(self, name: str) -> int | None:
        """The tenant's number, if it was ever given one."""
        return self._ids.get(name)


class BlockColumns:
    """State, references and owner of every block of the reserved range. Only the pool writes.

    All columns are [num_blocks_max].

    Attributes:
        states: uint8, values of ``BlockState``.
        ref_counts: int32, table entries and pins.
        pin_counts: int32, pins.
        idle_pin_counts: int32, pins that give way while somebody runs: those of idle sessions.
        depths: int32, logical index of an indexed block in its chain.
        groups: uint8, whose layers an indexed block holds.
        owner_ids: int64, the sequence that had it last.
        tenant_ids: int32, who is charged while it is held.
        causes: uint8, values of ``KvCause``; 0 for none.
        since_steps: int64.
        num_by_state: Blocks in each state.
        num_pinned: Blocks with at least one pin.
        num_held_by_tenant: Held blocks by tenant number; grows as tenants appear.
        num_yieldable: Held blocks whose references are all idle pins.
        num_yieldable_by_tenant: The same by tenant number.
    """

    def __init__(self, num_blocks: int, num_blocks_max: int) -> None:
        self.states: NDArray[np.uint8] = np.zeros(num_blocks_max, dtype=np.uint8)
        self.states[num_blocks:] = ABSENT
        self.ref_counts: Int32Array = np.zeros(num_blocks_max, dtype=np.int32)
        self.pin_counts: Int32Array = np.zeros(num_blocks_max, dtype=np.int32)
        self.idle_pin_counts: Int32Array = np.zeros(num_blocks_max, dtype=np.int32)
        self.depths: Int32Array = np.zeros(num_blocks_max, dtype=np.int32)
        self.groups: NDArray[np.uint8] = np.zeros(num_blocks_max, dtype=np.uint8)
        self.owner_ids: NDArray[np.int64] = np.zeros(num_blocks_max, dtype=np.int64)
        self.tenant_ids: Int32Array = np.zeros(num_blocks_max, dtype=np.int32)
        self.causes: NDArray[np.uint8] = np.zeros(num_blocks_max, dtype=np.uint8)
        self.since_steps: NDArray[np.int64] = np.zeros(num_blocks_max, dtype=np.int64)
        self.num_by_state = [0] * (ABSENT + 1)
        self.num_held_by_tenant = [0]
        self.num_yieldable = 0
        self.num_yieldable_by_tenant = [0]
        self.num_pinned = 0
        self.recount()

    def move(
        self, block_ids: Int64Array, source: BlockState, target: BlockState, step: int
    ) -> None:
        """Bring blocks from one state to another; charges and discharges their tenants."""
        self.states[block_ids] = target
        self.since_steps[block_ids] = step
        self.num_by_state[source] -= len(block_ids)
        self.num_by_state[target] += len(block_ids)
        if source is BlockState.HELD:
            self._charge(block_ids, -1)
        elif target is BlockState.HELD:
            self._charge(block_ids, 1)

    def follow(self, sources: Int64Array, targets: Int64Array) -> None:
        """What is known of each source is now true of its target; both are int64 [n].

        The sources are left free, of no interest to anybody, and uncounted as such.
        """
        for column in (
            self.states,
            self.ref_counts,
            self.pin_counts,
            self.idle_pin_counts,
            self.depths,
            self.groups,
            self.owner_ids,
            self.tenant_ids,
            self.causes,
            self.since_steps,
        ):
            column[targets] = column[sources]
            column[sources] = 0

    def refer(self, block_ids: Int64Array, change: int) -> None:
        """Count so many references more, or less, of each; no block twice."""
        if not self.num_pinned:
            self.ref_counts[block_ids] += change
            return
        self._count_yieldable(block_ids, -1)
        self.ref_counts[block_ids] += change
        self._count_yieldable(block_ids, 1)

    def drop_each(self, block_ids: Sequence[int]) -> list[int]:
        """Count one reference less for each time that a block is named; a loop, for few.

        Returns:
            Those that have none left.
        """
        num_dropped: dict[int, int] = {}
        for block_id in block_ids:
            num_dropped[block_id] = num_dropped.get(block_id, 0) + 1
        self._count_yieldable_of(num_dropped, -1)
        dropped = []
        for block_id, num in num_dropped.items():
            num_left = self.ref_counts.item(block_id) - num
            assert num_left >= 0, f"block {block_id} has {num_left} references"
            self.ref_counts[block_id] = num_left
            if not num_left:
                dropped.append(block_id)
        self._count_yieldable_of(num_dropped, 1)
        return dropped

    def pin(self, block_ids: Int64Array, change: int, *, is_idle: bool) -> None:
        """Count one pin more, or one less, of each, which is a reference; no block twice."""
        was_pinned = np.count_nonzero(self.pin_counts[block_ids])
        self._count_yieldable(block_ids, -1)
        self.ref_counts[block_ids] += change
        self.pin_counts[block_ids] += change
        if is_idle:
            self.idle_pin_counts[block_ids] += change
        self._count_yieldable(block_ids, 1)
        self.num_pinned += int(np.count_nonzero(self.pin_counts[block_ids]) - was_pinned)

    def is_yieldable(self, block_ids: Int64Array) -> NDArray[np.bool_]:
        """Whether each is held by idle pins alone: bool, of the shape of ``block_ids``."""
        num_idle = self.idle_pin_counts[block_ids]
        is_alone: NDArray[np.bool_] = (num_idle > 0) & (num_idle == self.ref_counts[block_ids])
        return is_alone

    def recount(self) -> None:
        """Count anew. Walks all columns: for faults and resizes only."""
        self.num_by_state = np.bincount(self.states, minlength=ABSENT + 1).tolist()
        self.num_pinned = int(np.count_nonzero(self.pin_counts))
        held = self.tenant_ids[self.states == BlockState.HELD]
        num_tenants = len(self.num_held_by_tenant)
        self.num_held_by_tenant = np.bincount(held, minlength=num_tenants).tolist()
        yieldable = self.tenant_ids[self.is_yieldable(np.arange(len(self.states)))]
        self.num_yieldable = len(yieldable)
        self.num_yieldable_by_tenant = np.bincount(yieldable, minlength=num_tenants).tolist()

    def check_known(self, block_ids: Int64Array, num_blocks: int) -> None:
        """Refuse ids outside the pool.

        Raises:
            UnknownBlockError: with the ids.
        """
        named = block_ids.tolist()
        if named and (min(named) < 0 or max(named) >= num_blocks):
            raise UnknownBlockError(
                "UNKNOWN_BLOCK",
                f"blocks {block_ids.tolist()} are not all in [0, {num_blocks})",
                block_ids=block_ids.tolist(),
                num_total=num_blocks,
            )

    def check_held(self, block_ids: Int64Array, is_spare: NDArray[np.bool_] | None = None) -> None:
        """Refuse ids that are named twice or, unless ``is_spare``, that nobody refers to.

        Raises:
            BlockNotHeldError: with the ids.
        """
        is_held: NDArray[np.bool_] = self.ref_counts[block_ids] > 0
        if is_spare is not None:
            is_held |= is_spare
        is_once = len(block_ids) == 1 or len(set(block_ids.tolist())) == len(block_ids)
        if is_once and is_held.all():
            return
        lacking = block_ids[~is_held].tolist()
        raise BlockNotHeldError(
            "BLOCK_NOT_HELD",
            f"of blocks {block_ids.tolist()}, {lacking} have no reference, or one is twice",
            block_ids=block_ids.tolist(),
            without_reference=lacking,
        )

    def _charge(self, block_ids: Int64Array, sign: int) -> None:
        self._count(self.num_held_by_tenant, block_ids, sign)

    def _count_yieldable(self, block_ids: Int64Array, sign: int) -> None:
        yieldable = block_ids[self.is_yieldable(block_ids)]
        self.num_yieldable += sign * len(yieldable)
        self._count(self.num_yieldable_by_tenant, yieldable, sign)

    def _count_yieldable_of(self, block_ids: Iterable[int], sign: int) -> None:
        if self.num_pinned:
            self._count_yieldable(np.array(list(block_ids), dtype=np.int64), sign)

    def _count(self, counts: list[int], block_ids: Int64Array, sign: int) -> None:
        """Count blocks by tenant; ``counts`` is one of the two columns over tenants."""
        if not len(block_ids):
            return
        tenant_ids = self.tenant_ids[block_ids].tolist()
        first = tenant_ids[0]
        # Blocks that change together are nearly always one tenant's.
        if tenant_ids.count(first) == len(tenant_ids):
            num_by_tenant = [(first, len(tenant_ids))]
        else:
            num_by_tenant = list(Counter(tenant_ids).items())
        for tenant_id, num_blocks in num_by_tenant:
            self._know_tenant(tenant_id)
            counts[tenant_id] += sign * num_blocks

    def _know_tenant(self, tenant_id: int) -> None:
        num_new = tenant_id + 1 - len(self.num_held_by_tenant)
        if num_new > 0:
            self.num_held_by_tenant += [0] * num_new
            self.num_yieldable_by_tenant += [0] * num_new


class HeldByTenant(Mapping[str, int]):
    """Held blocks by the name of their tenant, as they are when they are asked for.

    Asking for one tenant is O(1), however many were ever seen.
    """

    def __init__(self, columns: BlockColumns, tenants: Tenants) -> None:
        self._columns = columns
        self._tenants = tenants

    def __getitem__(self, tenant: str) -> int:
        tenant_id = self._tenants.known_id(tenant)
        if tenant_id is None or tenant_id >= len(self):
            raise KeyError(tenant)
        return self._columns.num_held_by_tenant[tenant_id]

    def __iter__(self) -> Iterator[str]:
        return map(self._tenants.name_of, range(len(self)))

    def __len__(self) -> int:
        return len(self._columns.num_held_by_tenant)
