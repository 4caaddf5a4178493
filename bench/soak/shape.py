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
    has_prefix_cache: bool = True
    eviction: str = "lru"
    session_idle_ns: int = 0
    session_ttl_ns: int = 0
