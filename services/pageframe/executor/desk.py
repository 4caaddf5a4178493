"""What may be asked of KV memory, and done to it, between two steps.

Plans of the scheduler change memory inside steps; operators, other backends and the passing of time
change it here. One thread calls everything, the same that runs the steps, so every change stands at
a step boundary.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pageframe.core.clock import Clock
from pageframe.core.errors import OutOfRangeError, ResourceExhaustedError
from pageframe.core.replica import TenantQuota, fitting_quotas
from pageframe.core.trace import KvCause
from pageframe.executor.batch import ModelRunner
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.block_keys import BlockKey
from pageframe.executor.memory.giving_up import fail_transfers
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.pool_upkeep import set_size
from pageframe.executor.memory.prefix_index import NO_BLOCK
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.resizing import check_resize, commit_moves, plan_moves
from pageframe.executor.memory.retaining import (
    finish_transfers,
    num_kept_tokens,
    pass_time,
    release_handle,
    retain,
)
from pageframe.executor.memory.retention import Retention as KeptPrefix
from pageframe.executor.memory.retention import RetentionKind as KeptKind
from pageframe.executor.memory.sequence_table import NO_ROW
from pageframe.wire.memory_facts import (
    BlockExplanation,
    HostFacts,
    MemorySnapshot,
    ResizeOutcome,
    Retention,
    RetentionFacts,
    RetentionKind,
    TableFacts,
    TenantUsage,
)

# Of keys and values for which a pool at rest has memory beyond the blocks in use: some ten thousand
# tokens of a small model, and half a second's work where a virtual machine gets it from its host.
_BYTES_AHEAD = 256 << 20
_KINDS = {KeptKind.HANDLE: RetentionKind.HANDLE, KeptKind.SESSION: RetentionKind.SESSION}


class MemoryDesk:
    """Serves everything but steps over one KV memory.

    Args:
        memory: KV memory.
        runner: Holds the bytes.
        clock: Tells when retentions expire.
        catch_up: Called before anything that looks at memory or changes it.

    Attributes:
        num_quota_changes: How often an operator has set a quota.
    """

    def __init__(
        self,
        memory: KvMemory,
        runner: ModelRunner,
        clock: Clock,
        catch_up: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._runner = runner
        self._clock = clock
        self._catch_up = catch_up
        self.num_quota_changes = 0
        # As they were asked for; a pool that is too small for all floors holds smaller ones.
        self._quotas_wanted: dict[str, TenantQuota] = {}

    @property
    def next_due_ns(self) -> int:
        """When ``pass_time`` is next due, nanoseconds since the Unix epoch; 0 for never."""
        return self._memory.retentions.next_due_ns

    def use_rest(self) -> bool:
        """Do a little of what would make later steps longer; whether there is more.

        The blocks above those in use are the next ones that a pool hands out: memory for them is
        taken here, and not by the step that first writes there. Where none is in use nothing is
        done, so that a server nobody calls stays small.
        """
        pool = self._memory.pool
        in_use = np.flatnonzero(pool.columns.states[: pool.num_blocks] != BlockState.FREE)
        if not in_use.size:
            return False
        num_ahead = _BYTES_AHEAD // self._runner.block_bytes
        return self._runner.take_memory(int(in_use[-1]) + 1 + num_ahead)

    def pass_time(self) -> bool:
        """Let go of what has expired and demote what is idle; whether anything changed."""
        self._catch_up()
        self._memory.pool.current_step = 0
        has_changed = pass_time(self._memory, self._clock.now_ns())
        self._move_now()
        return has_changed

    def snapshot(self) -> MemorySnapshot:
        """The pool as it stands; walks it."""
        self._catch_up()
        memory, columns = self._memory, self._memory.pool.columns
        end, host = memory.pool.num_blocks, memory.host
        held = memory.num_held_by_tenant()
        return MemorySnapshot(
            step=memory.last_applied_step,
            block_size=memory.options.block_size,
            account=memory.account(),
            states=columns.states[:end].copy(),
            ref_counts=columns.ref_counts[:end].copy(),
            pin_counts=columns.pin_counts[:end].copy(),
            is_indexed=memory.pool.index.is_indexed[:end].copy(),
            kv_groups=self._groups()[:end],
            tables=self._tables(),
            retentions=[_facts_of(kept) for kept in memory.retentions],
            quotas=[
                TenantUsage(quota=quota, num_blocks_held=held.get(quota.tenant, 0))
                for quota in memory.quotas
            ],
            host=HostFacts(
                num_slots=host.num_slots, num_used=host.num_used, num_held=host.num_held
            ),
        )

    def explain(self, block_id: int) -> BlockExplanation:
        """Who holds a block, and why.

        Raises:
            OutOfRangeError: BLOCK_UNKNOWN.
        """
        self._catch_up()
        memory = self._memory
        if not 0 <= block_id < memory.pool.num_blocks:
            raise OutOfRangeError(
                "BLOCK_UNKNOWN",
                f"block {block_id} is not in the pool of {memory.pool.num_blocks} blocks",
                block_id=block_id,
                num_blocks=memory.pool.num_blocks,
            )
        facts = memory.pool.explain(block_id)
        return BlockExplanation(
            block_id=block_id,
            state=int(facts.state),
            num_references=facts.num_references,
            num_pins=facts.num_pins,
            is_indexed=facts.is_indexed,
            kv_group=int(self._groups()[block_id]) if memory.options.num_groups > 1 else 0,
            tenant=facts.tenant,
            sequence_ids=[
                int(memory.sequences.sequence_ids[row])
                for row in memory.sequences.running_rows()
                if block_id in memory.tables.blocks_of(row)
            ],
            retentions=[
                _facts_of(kept) for kept in memory.retentions if block_id in kept.pinned.values()
            ],
            cause=facts.cause,
            step=facts.since_step,
        )

    def retain(
        self,
        *,
        tenant: str,
        cache_salt: bytes,
        name: str,
        token_ids: Sequence[int],
        ttl_ns: int,
        now_ns: int,
    ) -> RetentionFacts:
        """Keep the full blocks of a prefix, those of them that are here now and any that come.

        Raises:
            InvalidRequestError: HANDLE_TTL_NOT_POSITIVE.
            OutOfRangeError: HANDLE_TTL_ABOVE_MAX.
            ResourceExhaustedError: RETENTIONS_FULL; QUOTA_EXCEEDED when the tenant's quota leaves
                no room for a single one of the blocks that are here.
        """
        self._catch_up()
        memory = self._memory
        memory.pool.current_step = 0
        expire_ns = memory.retentions.handle_expire_ns(now_ns=now_ns, ttl_ns=ttl_ns)
        kept = retain(
            memory,
            tenant=tenant,
            cache_salt=cache_salt,
            name=name,
            token_ids=token_ids,
            expire_ns=expire_ns,
        )
        is_here = any(memory.pool.index.block_of(key) != NO_BLOCK for key in kept.keys)
        if is_here and not kept.pinned:
            release_handle(memory, tenant=tenant, name=name)
            self._refuse_pin(tenant, len(kept.keys))
        return RetentionFacts(
            name=name,
            num_tokens=num_kept_tokens(memory, kept),
            expire_ns=expire_ns,
        )

    def release(self, *, tenant: str, name: str) -> None:
        """Let go of a handle.

        Raises:
            NotFoundError: HANDLE_UNKNOWN; also for a handle of another tenant.
        """
        self._catch_up()
        self._memory.pool.current_step = 0
        release_handle(self._memory, tenant=tenant, name=name)

    def set_quota(self, quota: TenantQuota) -> int:
        """Bound a tenant; returns the blocks that it holds now.

        Raises:
            InvalidRequestError: as ``Quotas.set`` says; nothing was changed.
            PreconditionError: likewise.
        """
        memory = self._memory
        memory.quotas.set(quota, memory.pool.num_blocks)
        self._quotas_wanted[quota.tenant] = quota
        self.num_quota_changes += 1
        return memory.num_held_by_tenant().get(quota.tenant, 0)

    def replace_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Bound all tenants anew, as a scheduler's hello asks.

        Floors that are too much for the pool are cut, see ``fitting_quotas``, and grow again with
        it: a scheduler that comes back must not be locked out because the pool has shrunk.

        Raises:
            InvalidRequestError: as ``Quotas.replace`` says; nothing was changed.
        """
        self._adopt_quotas(quotas, self._memory.pool.num_blocks)
        self._quotas_wanted = {quota.tenant: quota for quota in quotas}

    def resize(self, num_blocks: int) -> ResizeOutcome:
        """Shrink or grow the pool.

        Raises:
            PageframeError: as ``memory.resizing.check_resize`` says, or ``KV_ARENA_TOO_LARGE``;
                then the pool has the size that it had.
        """
        memory = self._memory
        check_resize(memory, num_blocks)
        self._catch_up()
        memory.pool.current_step = 0
        num_moved = 0
        if num_blocks < memory.pool.num_blocks:
            sources, targets = plan_moves(memory, num_blocks)
            self._move_now()
            commit_moves(memory, sources, targets)
            num_moved = len(sources)
        self._runner.resize_pool(num_blocks)
        set_size(memory.pool, num_blocks, Purpose(KvCause.RESIZE))
        self._adopt_quotas(self._quotas_wanted.values(), num_blocks)
        return ResizeOutcome(account=memory.account(), num_blocks_moved=num_moved)

    def export_block(self, key: BlockKey) -> bytes | None:
        """The bytes of a block by its key, from the device or the host tier; None if not here."""
        self._catch_up()
        block_id = self._memory.pool.index.block_of(key)
        if block_id != NO_BLOCK:
            return self._runner.read_block(block_id)
        if key in self._memory.host:
            return self._runner.read_host(self._memory.host.slot_of(key))
        return None

    def import_block(self, key: BlockKey, data: bytes) -> bool:
        """Keep a block's bytes in the host tier under its key; whether there was room.

        From there it is promoted like anything else, so a disk or a remote tier
        (``host_tier.BlockStore``) need not know the device.
        """
        self._catch_up()
        host = self._memory.host
        if key in host or self._memory.pool.index.block_of(key) != NO_BLOCK:
            return True
        slot = host.store(key)
        if slot < 0:
            return False
        try:
            self._runner.write_host(slot, data)
        except BaseException:
            host.finish_transfer(key)
            host.remove(key)
            raise
        host.finish_transfer(key)
        return True

    def _adopt_quotas(self, quotas: Iterable[TenantQuota], num_blocks: int) -> None:
        self._memory.quotas.replace(fitting_quotas(quotas, num_blocks), num_blocks)

    def _move_now(self) -> None:
        moves = self._memory.transfers.take()
        if moves is None:
            return
        try:
            self._runner.move_blocks(moves)
        except BaseException:
            fail_transfers(self._memory)
            raise
        finish_transfers(self._memory)

    def _refuse_pin(self, tenant: str, num_blocks: int) -> None:
        quota = self._memory.quotas.quota_of(tenant)
        num_held = self._memory.num_held_by_tenant().get(tenant, 0)
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"{num_blocks} blocks were to be kept; tenant {tenant!r} holds {num_held}"
            + (f" and may hold {quota.ceiling_blocks}" if quota.ceiling_blocks is not None else ""),
            num_blocks=num_blocks,
            num_held_blocks=num_held,
            ceiling_blocks=quota.ceiling_blocks,
        )

    def _groups(self) -> NDArray[np.uint8]:
        """Whose layers each block holds, by its key or by its place in a table; walks all tables.

        Empty where there is one group of layers.
        """
        memory, tables = self._memory, self._memory.tables
        if memory.options.num_groups == 1:
            return np.empty(0, dtype=np.uint8)
        groups = memory.pool.columns.groups.copy()
        is_valid = tables.is_valid()
        columns = np.nonzero(is_valid)[1]
        groups[tables.entries[is_valid]] = columns % tables.num_groups
        return groups

    def _tables(self) -> list[TableFacts]:
        memory = self._memory
        rows = [seq for seq in memory.sequences.all() if seq.row != NO_ROW]
        return [
            TableFacts(
                sequence_id=sequence.sequence_id,
                request_id=sequence.request_id,
                tenant=memory.pool.tenants.name_of(sequence.tenant_id),
                block_ids=memory.tables.blocks_of(sequence.row).tolist(),
                first_block=int(memory.tables.first_block[sequence.row]),
                num_computed=int(memory.sequences.num_computed[sequence.row]),
                state=int(sequence.state),
            )
            for sequence in rows
        ]


def _facts_of(kept: KeptPrefix) -> Retention:
    return Retention(
        name=kept.name,
        kind=_KINDS[kept.kind],
        tenant=kept.tenant,
        num_blocks_pinned=len(kept.pinned),
        expire_ns=kept.expire_ns,
    )
