"""Facts of a replica for tests."""

from pageframe.core.replica import ReplicaFacts


def make_facts(
    *,
    max_model_len: int = 256,
    num_blocks: int = 64,
    block_size: int = 16,
    vocab_size: int = 512,
    model_folder: str = "",
    model: str = "tiny",
) -> ReplicaFacts:
    return ReplicaFacts(
        replica_id="replica-0",
        model=model,
        model_folder=model_folder,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=(1,),
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=64,
        max_num_sequences=16,
        max_step_tokens=256,
        device="sim",
        dtype="fp32",
        kv_dtype="fp32",
        runner="sim",
    )
