"""What an executor tells when somebody asks for metrics: counts that KV memory keeps anyway.

They are read beside the step thread, without a lock: single numbers are right, and those of a step
that is being applied may not yet add up.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import BoundedNames, Reading

_STATES = ("free", "held", "cached", "fenced", "quarantined")


class ExecutorMeter:
    """Reads KV memory.

    Args:
        num_operations: Operations on blocks so far.
        num_dropped: Trace records dropped so far.
    """

    def __init__(self, num_operations: Callable[[], int], num_dropped: Callable[[], int]) -> None:
        self._num_operations = num_operations
        self._num_dropped = num_dropped
        self._tenants = BoundedNames()

    def read(self, memory: KvMemory | None) -> Iterator[Reading]:
        """All values now; ``memory`` is None while the model loads."""
        if memory is not None:
            yield from self._read_pool(memory)
        yield Reading(metrics.KV_OPERATIONS, self._num_operations())
        yield Reading(metrics.DROPPED_RECORDS, self._num_dropped())

    def _read_pool(self, memory: KvMemory) -> Iterator[Reading]:
        account = memory.account()
        for state in _STATES:
            yield Reading(metrics.BLOCKS, getattr(account, state), (state,))
        yield Reading(metrics.PINNED_BLOCKS, account.pinned)
        yield Reading(metrics.HOST_BLOCKS, account.host_used)
        yield Reading(metrics.HOST_BLOCKS_MAX, account.host_total)
        pool = memory.pool
        held: Counter[str] = Counter()
        for tenant_id, num_held in enumerate(pool.columns.num_held_by_tenant):
            if tenant_id:  # 0 is nobody.
                held[self._tenants.of(pool.tenants.name_of(tenant_id))] += num_held
        for tenant, num_held in held.items():
            yield Reading(metrics.TENANT_BLOCKS, num_held, (tenant,))
