"""Pins give way before anybody would have to wait for ever.

A pin is a promise to keep, a running sequence a promise to go on. Where both cannot be kept:

    idle sessions    give way first: to running sequences and to newcomers
    victims          are preempted next
    handles          give way when what must run does not fit even then, or to a newcomer when
                     nobody runs who could ever make room

So pins never stop a replica that could serve. What gave way is demoted to the host tier as far as
that has room, and pinned again when it is computed again.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

import numpy as np

from pageframe.core.trace import KvCause, TraceSink
from pageframe.executor.memory.eviction import EvictionPolicy
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.retaining import demote
from pageframe.executor.memory.retention import Retention


def num_yieldable(
    memory: KvMemory,
    needs: Mapping[int, int],
    shared: Iterable[int] = (),
    *,
    with_handles: bool = False,
) -> int:
    """Blocks that would become available if pins gave way.

    O(tenants), with handles O(pins).

    Args:
        memory: Read.
        needs: Tenants who need blocks, and how many. Pins on blocks of others do not give way below
            their tenant's floor.
        shared: Blocks that are about to be shared, and so would stay held.
        with_handles: Whether handles give way as well as idle sessions.
    """
    columns = memory.pool.columns
    if not memory.pool.num_pinned:
        return 0
    by_tenant = num_yieldable_by_tenant(memory, with_handles=with_handles)
    for block_id in shared:
        if _is_alone(memory, block_id, with_handles):
            by_tenant[columns.tenant_ids[block_id]] -= 1
    return sum(by_tenant) - memory.num_protected(by_tenant, needs)


def num_yieldable_by_tenant(memory: KvMemory, *, with_handles: bool) -> list[int]:
    """Blocks that only such pins hold as would give way, by tenant number, in a new list."""
    columns = memory.pool.columns
    if not with_handles:
        return columns.num_yieldable_by_tenant.copy()
    pinned = np.array(list(set(memory.retentions.pinned_block_ids())), dtype=np.int64)
    alone = pinned[columns.ref_counts[pinned] == columns.pin_counts[pinned]]
    num_tenants = len(columns.num_held_by_tenant)
    by_tenant: list[int] = np.bincount(columns.tenant_ids[alone], minlength=num_tenants).tolist()
    return by_tenant


def yield_pins(memory: KvMemory, num_blocks: int, tenant_ids: Container[int]) -> None:
    """Have pins give way until ``num_blocks`` more are available.

    Sessions first, oldest first, and of each the tail of its chain before the head. Pins on blocks
    of other tenants than ``tenant_ids`` do not give way below their tenant's floor.
    """
    target = memory.pool.num_available + num_blocks
    for with_handles in (False, True):
        for block_id in _candidates(memory, with_handles=with_handles):
            if memory.pool.num_available >= target:
                return
            tenant_id = int(memory.pool.columns.tenant_ids[block_id])
            if tenant_id in tenant_ids or memory.num_above_floor(tenant_id) > 0:
                _yield_block(memory, block_id)


def yield_own(memory: KvMemory, tenant_id: int, num_blocks: int) -> bool:
    """Have idle sessions give way, so that a tenant's ceiling leaves room for what it runs.

    What counts is who is charged for a block. Where tenants share a salt, that may be another than
    the one whose chat it is.

    Returns:
        Whether it holds ``num_blocks`` fewer now; else nothing gave way.
    """
    if num_blocks > num_own_yieldable(memory, tenant_id):
        return False
    own = (
        block_id
        for block_id in _candidates(memory, with_handles=False)
        if memory.pool.columns.tenant_ids[block_id] == tenant_id
    )
    for block_id in islice(own, num_blocks):
        _yield_block(memory, block_id)
    return True


def num_own_yieldable(memory: KvMemory, tenant_id: int) -> int:
    """Blocks fewer that a tenant would hold without idle sessions."""
    by_tenant = memory.pool.columns.num_yieldable_by_tenant
    return by_tenant[tenant_id] if tenant_id < len(by_tenant) else 0


def _candidates(memory: KvMemory, *, with_handles: bool) -> Iterator[int]:
    """Blocks that only pins hold which give way, in the order in which they do."""
    kept = [it for it in memory.retentions if it.is_session or with_handles]
    for retention in sorted(kept, key=_rank):
        for key in reversed(retention.keys):
            # Looked at when its turn comes: a block may have given way for another retention.
            block_id = retention.pinned.get(key)
            if block_id is not None and _is_alone(memory, block_id, with_handles):
                yield block_id


def _is_alone(memory: KvMemory, block_id: int, with_handles: bool) -> bool:
    """Whether a block is held by nothing but pins that give way."""
    columns = memory.pool.columns
    num_pins = columns.pin_counts if with_handles else columns.idle_pin_counts
    return bool(0 < num_pins[block_id] == columns.ref_counts[block_id])


def _yield_block(memory: KvMemory, block_id: int) -> None:
    for retention, key in memory.retentions.pins_of(block_id):
        demote(memory, retention, [key], KvCause.POOL_PRESSURE)


def make_room_below_ceiling(memory: KvMemory, tenant_id: int, num_blocks: int) -> bool:
    """Have idle sessions give way, so that a tenant's ceiling leaves room for ``num_blocks`` more.

    Returns:
        Whether it does now; else nothing gave way.
    """
    tenant = memory.pool.tenants.name_of(tenant_id)
    held = memory.num_held_by_tenant()
    return yield_own(memory, tenant_id, memory.quotas.num_over_ceiling(tenant, num_blocks, held))


def build_memory(
    options: MemoryOptions, *, trace: TraceSink, eviction: EvictionPolicy | None = None
) -> KvMemory:
    """An empty KV memory whose pins give way."""
    memory = KvMemory(options, trace=trace, eviction=eviction)
    memory.pool.supply.on_shortage = partial(yield_pins, memory)
    return memory


def _rank(retention: Retention) -> tuple[bool, int]:
    return not retention.is_session, retention.expire_ns
