"""Sizes and choices of KV memory, fixed at its start."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What KV memory is made for.

    Attributes:
        num_blocks: Blocks in the pool at first.
        block_size: Tokens per block.
        max_num_sequences: Most sequences that run at once.
        max_model_len: Most tokens of one sequence.
        num_blocks_max: Blocks that the pool may grow to; 0 for no growth.
        num_host_slots: Blocks that the host tier holds; 0 for none.
        window_tokens: Positions that a token sees, itself included, in all layers; 0 for all.
        has_prefix_cache: Whether sequences share what others computed.
        model: Name of the model, in every key.
        kv_dtype: Type of keys and values, in every key.
    """

    num_blocks: int
    block_size: int
    max_num_sequences: int
    max_model_len: int
    num_blocks_max: int = 0
    num_host_slots: int = 0
    window_tokens: int = 0
    has_prefix_cache: bool = True
    model: str = ""
    kv_dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """What a step and a sequence may ask for.

    Attributes:
        max_step_tokens: Most tokens one step may compute.
        max_model_len: Most tokens of one sequence, prompt and output together.
        vocab_size: Token ids lie in ``[0, vocab_size)``.
    """

    max_step_tokens: int
    max_model_len: int
    vocab_size: int
