"""What an executor says of itself: the facts of its model, its memory and its bounds in one."""

from pageframe.core.replica import ReplicaFacts
from pageframe.executor.batch import ModelFacts
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.options import StepBounds


def describe(
    replica_id: str, facts: ModelFacts, memory: KvMemory, bounds: StepBounds
) -> ReplicaFacts:
    """What the replica serves, with the blocks that its pool has now."""
    return ReplicaFacts(
        replica_id=replica_id,
        model=facts.name,
        model_folder=facts.folder,
        vocab_size=facts.vocab_size,
        max_model_len=bounds.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        block_size=memory.tables.block_size,
        num_blocks=memory.pool.num_blocks,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        max_num_sequences=memory.options.max_num_sequences,
        max_step_tokens=bounds.max_step_tokens,
        device=facts.device,
        dtype=facts.dtype,
        kv_dtype=facts.kv_dtype,
        runner=facts.runner,
        num_host_blocks=memory.host.num_slots,
        kv_group_windows=memory.options.windows,
        kernels=facts.kernels,
        takes_grammars=facts.takes_grammars,
    )
