"""What KV memory shows of itself, and how much of it a tenant may see.

Tenants share a pool and may see how full it is, block by block. Who holds what is for the holder
itself and for operators.
"""

from collections.abc import Callable
from dataclasses import replace

from pageframe.executor.sequence_owners import SequenceOwner
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    BlockExplanation,
    HostFacts,
    MemorySnapshot,
    OperationBatch,
    ResizeOutcome,
    Retention,
    RetentionFacts,
    RetentionKind,
    SequenceFacts,
    TableFacts,
    TenantUsage,
)

__all__ = [
    "BLOCK_STATE_NAMES",
    "BlockExplanation",
    "HostFacts",
    "MemorySnapshot",
    "ResizeOutcome",
    "Retention",
    "RetentionFacts",
    "RetentionKind",
    "TableFacts",
    "TenantUsage",
    "batch_told_to",
    "explanation_seen_by",
    "snapshot_seen_by",
]


def snapshot_seen_by(tenant: str, snapshot: MemorySnapshot) -> MemorySnapshot:
    """The snapshot as a tenant that is no operator sees it.

    Tables and retentions of other tenants stay, without their names; bounds of other tenants go.
    """
    return replace(
        snapshot,
        tables=[
            table if table.tenant == tenant else _anonymous_table(table)
            for table in snapshot.tables
        ],
        retentions=[
            retention if retention.tenant == tenant else replace(retention, name="", tenant="")
            for retention in snapshot.retentions
        ],
        quotas=[usage for usage in snapshot.quotas if usage.quota.tenant == tenant],
    )


def explanation_seen_by(
    tenant: str, explanation: BlockExplanation, tenant_of: Callable[[int], str | None]
) -> BlockExplanation:
    """The explanation as a tenant that is no operator sees it.

    ``tenant_of`` says whose a sequence is; a sequence of which nobody knows that is left out.
    """
    return replace(
        explanation,
        tenant=tenant if explanation.tenant == tenant else "",
        sequence_ids=[it for it in explanation.sequence_ids if tenant_of(it) == tenant],
        retentions=[it for it in explanation.retentions if it.tenant == tenant],
    )


def batch_told_to(
    caller: Caller,
    batch: OperationBatch,
    owner_at: Callable[[int, int], SequenceOwner | None],
) -> OperationBatch:
    """The operations with the names of their sequences, as the caller sees them.

    To a tenant that is no operator, sequences of others have number 0 and no name. ``owner_at``
    says whose a sequence was in an operation.
    """
    owners: dict[int, SequenceOwner] = {}
    operations = []
    for it in batch.operations:
        owner = owner_at(it.sequence_id, it.number)
        is_own = owner is not None and owner.tenant == caller.tenant
        is_shown = is_own or caller.is_operator
        if owner is not None and is_shown:
            owners[it.sequence_id] = owner
        operations.append(it if is_shown else it._replace(sequence_id=0))
    sequences = [
        SequenceFacts(sequence_id, owner.request_id, owner.tenant, owner.since_ns)
        for sequence_id, owner in owners.items()
    ]
    return batch._replace(operations=operations, sequences=sequences)


def _anonymous_table(table: TableFacts) -> TableFacts:
    return TableFacts(
        sequence_id=0,
        request_id="",
        tenant="",
        block_ids=table.block_ids,
        first_block=table.first_block,
        num_computed=table.num_computed,
        state=table.state,
    )
