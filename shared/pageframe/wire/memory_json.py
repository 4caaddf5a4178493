"""What KV memory tells, for readers of JSON: the command and the pool page."""

from collections.abc import Sequence
from dataclasses import fields

from pageframe.core.replica import PoolAccount
from pageframe.wire.kv_memory import CAUSE_NAMES
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    BlockExplanation,
    ReplicaPool,
    Retention,
)

_COUNTS = ("total", "free", "held", "cached", "fenced", "quarantined", "pinned")


def explanation_to_json(block: BlockExplanation) -> dict[str, object]:
    """One block; times are nanoseconds since the Unix epoch, None is what never was."""
    return {
        "block_id": block.block_id,
        "state": BLOCK_STATE_NAMES[block.state],
        "references": block.num_references,
        "pins": block.num_pins,
        "indexed": block.is_indexed,
        "group": block.kv_group,
        "tenant": block.tenant,
        "sequence_ids": block.sequence_ids,
        "retentions": [retention_to_json(it) for it in block.retentions],
        "operation": None if block.operation is None else block.operation.span_name,
        "operation_number": block.operation_number,
        "cause": None if block.cause is None else CAUSE_NAMES[block.cause],
        "step": block.step,
        "time_ns": block.time_ns,
    }


def account_to_json(account: PoolAccount) -> dict[str, int]:
    """Blocks of a pool by state."""
    return {name: getattr(account, name) for name in _COUNTS}


def pools_to_json(pools: Sequence[ReplicaPool]) -> dict[str, object]:
    """The pools of all replicas, and those that are there together."""
    return {
        "replicas": [
            {
                "replica": it.replica,
                "pool": None if it.account is None else account_to_json(it.account),
                "away": it.away,
            }
            for it in pools
        ],
        "total": account_to_json(sum_of(pools)),
    }


def sum_of(pools: Sequence[ReplicaPool]) -> PoolAccount:
    """The pools of all replicas that are there, counted as one."""
    accounts = [it.account for it in pools if it.account is not None]
    names = [it.name for it in fields(PoolAccount)]
    return PoolAccount(**{name: sum(getattr(it, name) for it in accounts) for name in names})


def retention_to_json(retention: Retention) -> dict[str, object]:
    """What keeps blocks under a name."""
    return {
        "name": retention.name,
        "kind": retention.kind.name.lower(),
        "tenant": retention.tenant,
        "num_blocks_pinned": retention.num_blocks_pinned,
        "expire_ns": retention.expire_ns,
    }
