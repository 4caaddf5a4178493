"""What KV memory shows of itself, and how much of it a tenant may see.

Tenants share a pool and may see how full it is, block by block. Who holds what is for the holder
itself and for operators.
"""

from collections.abc import Callable
from dataclasses import replace

from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
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
