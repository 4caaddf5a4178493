"""Facts of a replica and the account of its pool, between domain types and protobuf."""

from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.v1 import executor_service_pb2, kv_block_pb2


def pool_to_proto(account: PoolAccount) -> kv_block_pb2.PoolAccount:
    """Convert the counts of a pool."""
    return kv_block_pb2.PoolAccount(
        total=account.total,
        free=account.free,
        held=account.held,
        cached=account.cached,
        fenced=account.fenced,
        quarantined=account.quarantined,
        pinned=account.pinned,
        yieldable=account.yieldable,
        host_total=account.host_total,
        host_used=account.host_used,
    )


def pool_from_proto(message: kv_block_pb2.PoolAccount) -> PoolAccount:
    """Convert the counts of a pool."""
    return PoolAccount(
        total=message.total,
        free=message.free,
        held=message.held,
        cached=message.cached,
        fenced=message.fenced,
        quarantined=message.quarantined,
        pinned=message.pinned,
        yieldable=message.yieldable,
        host_total=message.host_total,
        host_used=message.host_used,
    )


def replica_to_proto(facts: ReplicaFacts) -> executor_service_pb2.Replica:
    """Convert the facts of a replica."""
    return executor_service_pb2.Replica(
        replica_id=facts.replica_id,
        model=facts.model,
        model_folder=facts.model_folder,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        block_size=facts.block_size,
        num_blocks=facts.num_blocks,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        max_num_sequences=facts.max_num_sequences,
        max_step_tokens=facts.max_step_tokens,
        device=facts.device,
        dtype=facts.dtype,
        kv_dtype=facts.kv_dtype,
        runner=facts.runner,
        num_host_blocks=facts.num_host_blocks,
        num_kv_groups=facts.num_kv_groups,
        kv_group_windows=facts.kv_group_windows,
        kernels=facts.kernels,
        takes_grammars=facts.takes_grammars,
    )


def replica_from_proto(message: executor_service_pb2.Replica) -> ReplicaFacts:
    """Convert the facts of a replica."""
    return ReplicaFacts(
        replica_id=message.replica_id,
        model=message.model,
        model_folder=message.model_folder,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        eos_token_ids=tuple(message.eos_token_ids),
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        kv_bytes_per_token=message.kv_bytes_per_token,
        max_num_sequences=message.max_num_sequences,
        max_step_tokens=message.max_step_tokens,
        device=message.device,
        dtype=message.dtype,
        kv_dtype=message.kv_dtype,
        runner=message.runner,
        num_host_blocks=message.num_host_blocks,
        kv_group_windows=tuple(message.kv_group_windows) or (0,) * max(1, message.num_kv_groups),
        kernels=message.kernels,
        takes_grammars=message.takes_grammars,
    )


def quota_to_proto(quota: TenantQuota) -> executor_service_pb2.TenantQuota:
    """Convert the bounds of one tenant."""
    return executor_service_pb2.TenantQuota(
        tenant=quota.tenant,
        floor_blocks=quota.floor_blocks,
        ceiling_blocks=quota.ceiling_blocks,
    )


def quota_from_proto(message: executor_service_pb2.TenantQuota) -> TenantQuota:
    """Convert the bounds of one tenant."""
    return TenantQuota(
        tenant=message.tenant,
        floor_blocks=message.floor_blocks,
        ceiling_blocks=message.ceiling_blocks if message.HasField("ceiling_blocks") else None,
    )
