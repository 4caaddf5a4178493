"""What an executor serves, and how its pool stands."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantQuota:
    """Bounds of one tenant's held blocks.

    Attributes:
        tenant: Whose.
        floor_blocks: Blocks that others cannot take.
        ceiling_blocks: Blocks that it cannot pass; None for no ceiling.
    """

    tenant: str
    floor_blocks: int = 0
    ceiling_blocks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAccount:
    """Blocks of the pool by state; ``free + held + cached + fenced + quarantined == total``.

    ``pinned`` is part of ``held``, and ``yieldable`` of ``pinned``: what only pins hold that give
    way to anybody while somebody runs. ``host_total`` and ``host_used`` are of the host tier.
    """

    total: int = 0
    free: int = 0
    held: int = 0
    cached: int = 0
    fenced: int = 0
    quarantined: int = 0
    pinned: int = 0
    yieldable: int = 0
    host_total: int = 0
    host_used: int = 0

    @property
    def is_conserved(self) -> bool:
        """Whether the states add up to the total."""
        parts = self.free + self.held + self.cached + self.fenced + self.quarantined
        return parts == self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What an executor serves; told once to a scheduler, and by it to gateways.

    Attributes:
        replica_id: Name of the model replica; constant over restarts.
        model: Name under which the model is served.
        model_folder: Hugging Face folder that holds tokenizer and chat template.
        vocab_size: Number of token ids that logits have.
        max_model_len: Most tokens, prompt and output together, of one sequence.
        eos_token_ids: Tokens that end a sequence unless ``ignore_eos``.
        block_size: Tokens per block.
        num_blocks: Blocks in the pool.
        kv_bytes_per_token: Bytes of keys and values that one token takes over all layers.
        max_num_sequences: Most sequences that may run at once.
        max_step_tokens: Most tokens that one step may compute.
        device: ``cpu``, ``cuda:0``, or ``sim``.
        dtype: Type of weights and activations.
        kv_dtype: Type of keys and values in the pool.
        runner: ``native``, ``transformers`` or ``sim``.
        num_host_blocks: Blocks that the host tier holds; 0 when there is none.
        num_kv_groups: Groups of layers with different sliding windows, G. A block holds the layers
            of one group, so ``block_size`` tokens take G blocks; fewer behind a window.
    """

    replica_id: str
    model: str
    model_folder: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    max_num_sequences: int
    max_step_tokens: int
    device: str
    dtype: str
    kv_dtype: str
    runner: str
    num_host_blocks: int = 0
    num_kv_groups: int = 1
