"""Sizes and choices of KV memory, fixed at its start."""

from dataclasses import dataclass

from pageframe.executor.memory.retention import HANDLE_TTL_NS_MAX


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
        group_windows: The same for each group of layers, where they differ; empty for one group.
        has_prefix_cache: Whether sequences share what others computed.
        model: Name of the model, in every key.
        kv_dtype: Type of keys and values, in every key.
        handle_ttl_max_ns: Longest time that a prefix may be kept under a handle.
    """

    num_blocks: int
    block_size: int
    max_num_sequences: int
    max_model_len: int
    num_blocks_max: int = 0
    num_host_slots: int = 0
    window_tokens: int = 0
    group_windows: tuple[int, ...] = ()
    has_prefix_cache: bool = True
    model: str = ""
    kv_dtype: str = ""
    handle_ttl_max_ns: int = HANDLE_TTL_NS_MAX

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that a token sees in each group of layers; 0 for all."""
        return self.group_windows or (self.window_tokens,)

    @property
    def num_groups(self) -> int:
        """Groups of layers, each with blocks of its own."""
        return len(self.windows)

    def places_read(self, num_blocks: int) -> list[tuple[int, int]]:
        """Of so many full blocks, those that the token behind them reads.

        Returns:
            Logical block and group of each, in the order of a block table.
        """
        firsts = self.first_blocks(num_blocks * self.block_size)
        return [
            (depth, group)
            for depth in range(min(firsts), num_blocks)
            for group, first in enumerate(firsts)
            if depth >= first
        ]

    def first_blocks(self, position: int) -> list[int]:
        """The first logical block that the token at ``position`` reads, in each group."""
        return [
            max(0, position - window + 1) // self.block_size if window else 0
            for window in self.windows
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """What a step and a sequence may ask for.

    Attributes:
        max_step_tokens: Most tokens one step may compute.
        max_model_len: Most tokens of one sequence, prompt and output together.
        vocab_size: Token ids lie in ``[0, vocab_size)``.
        takes_grammars: Whether outputs can be held to a grammar.
    """

    max_step_tokens: int
    max_model_len: int
    vocab_size: int
    takes_grammars: bool = False
