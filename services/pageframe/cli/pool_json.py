"""What ``pageframe pool`` prints for machines: one document, or one object a line."""

from typing import Any

from pageframe.wire.kv_memory import CAUSE_NAMES
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    SEQUENCE_STATE_NAMES,
    MemorySnapshot,
    OperationRecord,
    ResizeOutcome,
    RetentionFacts,
    SequenceFacts,
)
from pageframe.wire.memory_json import account_to_json, retention_to_json


def snapshot_to_json(snapshot: MemorySnapshot) -> dict[str, Any]:
    """The pool; arrays in ``blocks`` are indexed by block id."""
    return {
        "step": snapshot.step,
        "operation": snapshot.operation,
        "pool_incarnation": snapshot.pool_incarnation,
        "block_size": snapshot.block_size,
        "pool": account_to_json(snapshot.account),
        "blocks": {
            "state": [BLOCK_STATE_NAMES[state] for state in snapshot.states],
            "references": snapshot.ref_counts.tolist(),
            "pins": snapshot.pin_counts.tolist(),
            "indexed": snapshot.is_indexed.tolist(),
            "group": snapshot.kv_groups.tolist() or [0] * len(snapshot.states),
        },
        "sequences": [
            {
                "sequence_id": table.sequence_id,
                "request_id": table.request_id,
                "tenant": table.tenant,
                "state": SEQUENCE_STATE_NAMES[table.state],
                "block_ids": table.block_ids,
                "first_block_index": table.first_block,
                "num_computed_tokens": table.num_computed,
                "since_ns": table.since_ns,
            }
            for table in snapshot.tables
        ],
        "retentions": [retention_to_json(it) for it in snapshot.retentions],
        "tenants": [
            {
                "tenant": usage.quota.tenant,
                "floor_blocks": usage.quota.floor_blocks,
                "ceiling_blocks": usage.quota.ceiling_blocks,
                "num_blocks_held": usage.num_blocks_held,
            }
            for usage in snapshot.quotas
        ],
        "host_tier": {
            "num_slots": snapshot.host.num_slots,
            "num_used": snapshot.host.num_used,
            "num_held": snapshot.host.num_held,
        },
    }


def operation_to_json(record: OperationRecord, whose: SequenceFacts | None) -> dict[str, Any]:
    """One operation; ``whose`` its sequence is, where that is known."""
    return {
        "number": record.number,
        "operation": record.operation.span_name,
        "cause": CAUSE_NAMES[record.cause],
        "sequence_id": record.sequence_id,
        "request_id": "" if whose is None else whose.request_id,
        "tenant": "" if whose is None else whose.tenant,
        "step": record.step,
        "block_ids": list(record.block_ids),
        "target_ids": list(record.target_ids),
    }


def retention_facts_to_json(facts: RetentionFacts) -> dict[str, Any]:
    """What was retained."""
    return {"handle": facts.name, "num_tokens": facts.num_tokens, "expire_ns": facts.expire_ns}


def resize_outcome_to_json(outcome: ResizeOutcome) -> dict[str, Any]:
    """The pool after a resize."""
    return {
        "pool": account_to_json(outcome.account),
        "num_blocks_moved": outcome.num_blocks_moved,
    }
