"""Pins give way before anybody would have to wait for ever.

A pin is a promise to keep, a running sequence a promise to go on. Where both cannot be kept:

    idle sessions    give way first: to running sequences and to newcomers
    victims          are preempted next
    handles          give way when what must run does not fit even then, or to a newcomer when
                     nobody runs who could ever make room

So pins never stop a replica that could serve. What gave way is demoted to the host tier as far as
that has room, and pinned again when it is computed again.
"""

from collections import Counter
from collections.abc import Container, Iterable
from functools import partial

from pageframe.core.trace import KvCause, TraceSink
from pageframe.executor.memory.eviction import EvictionPolicy
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.retaining import demote
from pageframe.executor.memory.retention import Retention, RetentionKind

SESSIONS = frozenset({RetentionKind.SESSION})
ALL_PINS = frozenset(RetentionKind)


def num_yieldable(
    memory: KvMemory,
    kinds: Container[RetentionKind],
    tenant_ids: Container[int],
    needed: Iterable[int] = (),
) -> int:
    """Blocks that would become available if pins of these kinds gave way.

    Args:
        memory: Read.
        kinds: Whose pins.
        tenant_ids: For whom. Pins of others do not give way below their tenant's floor.
        needed: Blocks that are about to be shared, and so would stay held.
    """
    if not memory.pool.num_pinned:
        return 0
    num_pins = Counter(
        block_id
        for retention in memory.retentions
        if retention.kind in kinds
        for block_id in retention.pinned.values()
    )
    for block_id in needed:
        num_pins.pop(block_id, None)
    columns = memory.pool.columns
    by_tenant = Counter(
        int(columns.tenant_ids[block_id])
        for block_id, count in num_pins.items()
        if columns.ref_counts[block_id] == count
    )
    return sum(
        count if tenant_id in tenant_ids else min(count, _num_above_floor(memory, tenant_id))
        for tenant_id, count in by_tenant.items()
    )


def yield_pins(memory: KvMemory, num_blocks: int, tenant_ids: Container[int]) -> None:
    """Have pins give way until ``num_blocks`` more are available.

    Sessions first, oldest first, and of each the tail of its chain before the head. Pins of other
    tenants than ``tenant_ids`` do not give way below their tenant's floor.
    """
    target = memory.pool.num_available + num_blocks
    for retention in sorted(memory.retentions, key=_rank):
        for key in [key for key in reversed(retention.keys) if key in retention.pinned]:
            if memory.pool.num_available >= target:
                return
            tenant_id = int(memory.pool.columns.tenant_ids[retention.pinned[key]])
            if tenant_id in tenant_ids or _num_above_floor(memory, tenant_id) > 0:
                demote(memory, retention, [key], KvCause.POOL_PRESSURE)


def yield_own(memory: KvMemory, tenant_id: int, num_blocks: int) -> int:
    """Have a tenant's own idle sessions give way, so that its ceiling leaves room for what it runs.

    Returns:
        How many blocks fewer it holds then; at most about ``num_blocks``.
    """
    held = memory.pool.columns.num_held_by_tenant
    if tenant_id >= len(held) or not memory.pool.num_pinned:
        return 0
    before = held[tenant_id]
    name = memory.pool.tenants.name_of(tenant_id)
    own = [it for it in memory.retentions if it.kind in SESSIONS and it.tenant == name]
    for retention in sorted(own, key=_rank):
        for key in [key for key in reversed(retention.keys) if key in retention.pinned]:
            if before - held[tenant_id] >= num_blocks:
                return num_blocks
            demote(memory, retention, [key], KvCause.POOL_PRESSURE)
    return before - held[tenant_id]


def num_own_yieldable(memory: KvMemory, tenant_id: int) -> int:
    """Blocks fewer that a tenant would hold without its idle sessions."""
    if not memory.pool.num_pinned:
        return 0
    columns = memory.pool.columns
    num_pins = Counter(
        block_id
        for retention in memory.retentions
        if retention.kind in SESSIONS
        for block_id in retention.pinned.values()
        if columns.tenant_ids[block_id] == tenant_id
    )
    return sum(columns.ref_counts[block_id] == count for block_id, count in num_pins.items())


def _num_above_floor(memory: KvMemory, tenant_id: int) -> int:
    """Held blocks of a tenant that others may take."""
    held = memory.pool.columns.num_held_by_tenant
    num_held = held[tenant_id] if tenant_id < len(held) else 0
    if memory.quotas.is_empty:
        return num_held
    quota = memory.quotas.quota_of(memory.pool.tenants.name_of(tenant_id))
    return max(0, num_held - quota.floor_blocks)


def build_memory(
    options: MemoryOptions, *, trace: TraceSink, eviction: EvictionPolicy | None = None
) -> KvMemory:
    """An empty KV memory whose pins give way."""
    memory = KvMemory(options, trace=trace, eviction=eviction)
    memory.pool.supply.on_shortage = partial(yield_pins, memory)
    return memory


def _rank(retention: Retention) -> tuple[bool, int]:
    return retention.kind is RetentionKind.HANDLE, retention.expire_ns
