"""What a memory under audit is made for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and choices; see ``MemoryOptions`` and ``StepEngine``.

    Without a prefix cache every sequence has a salt of its own, which is its id.
    """

    num_blocks: int
    block_size: int
    num_rows: int
    max_step_tokens: int
    max_model_len: int
    num_blocks_max: int
    num_host_slots: int = 0
    window_tokens: int = 0
    group_windows: tuple[int, ...] = ()
    has_prefix_cache: bool = True
    eviction: str = "lru"
    session_idle_ns: int = 0
    session_ttl_ns: int = 0

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that a token sees in each group of layers; 0 for all."""
        return self.group_windows or (self.window_tokens,)

    @property
    def num_groups(self) -> int:
        """Groups of layers."""
        return len(self.windows)

    @property
    def num_logical_blocks(self) -> int:
        """Logical blocks that the pool holds, in all groups."""
        return self.num_blocks // self.num_groups

    def places_read(self, num_blocks: int, position: int) -> list[tuple[int, int]]:
        """Of the first ``num_blocks`` logical blocks, those that the token at ``position`` reads.

        Returns:
            Logical block and group of each, in turns.
        """
        return [
            (logical, group)
            for logical in range(num_blocks)
            for group, window in enumerate(self.windows)
            if not window or (logical + 1) * self.block_size > position - window + 1
        ]
