"""What an executor serves, and how its pool stands."""

import functools
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pageframe.core.units import ceil_div


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


def fitting_quotas(quotas: Iterable[TenantQuota], num_blocks: int) -> list[TenantQuota]:
    """``quotas`` with floors that add up to ``num_blocks`` at most, all cut by the same factor.

    A pool may have become smaller than it was when the floors were chosen. Whoever connects to it
    then is served with less assured to each, rather than not at all.
    """
    wanted = list(quotas)
    num_floor_blocks = sum(quota.floor_blocks for quota in wanted)
    if num_floor_blocks <= num_blocks:
        return wanted
    return [
        replace(quota, floor_blocks=quota.floor_blocks * num_blocks // num_floor_blocks)
        for quota in wanted
    ]


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
        kv_group_windows: Positions that a token sees in each group of layers, itself included; 0
            for all. A block holds the layers of one group, so ``block_size`` tokens take a block
            in each; what lies behind the window of a group is given back.
        kernels: What computes the native runner's steps on a CPU: ``fused (avx2)``, or ``torch``
            and why; empty for others.
        takes_grammars: Whether outputs can be held to a grammar.
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
    kv_group_windows: tuple[int, ...] = (0,)
    kernels: str = ""
    takes_grammars: bool = False

    @property
    def num_kv_groups(self) -> int:
        """Groups of layers with different windows."""
        return len(self.kv_group_windows)

    def num_blocks_peak(self, num_tokens: int, num_step_tokens: int) -> int:
        """Most blocks that a sequence holds at a time on its way to ``num_tokens`` tokens.

        A step computes at most ``num_step_tokens`` of it, and behind the step each group gives back
        what no later token sees:

            0                                                  num_tokens
            [── given back ──)[── window - 1 ──)[── a step ──)
                              ╰── held; begins and ends in the midst of blocks
        """
        shape = (self.kv_group_windows, self.block_size, num_step_tokens)
        return _num_blocks_peak(*shape, ceil_div(num_tokens, self.block_size))

    def num_tokens_fitting(self, num_blocks: int) -> int:
        """Tokens of the longest sequence that never holds more than ``num_blocks``.

        In whole blocks, and no more than ``max_model_len`` of them where nothing else bounds it.
        """
        shape = (self.kv_group_windows, self.block_size, self.max_step_tokens)
        return _num_tokens_fitting(*shape, num_blocks, self.max_model_len)


def _num_blocks_peak(
    windows: tuple[int, ...], block_size: int, num_step_tokens: int, num_all: int
) -> int:
    """As ``ReplicaFacts.num_blocks_peak``, of a sequence of ``num_all`` blocks."""
    num_blocks = 0
    for window in windows:
        # What is held begins anywhere in its first block.
        num_held = ceil_div(window + num_step_tokens - 2, block_size) + 1
        num_blocks += min(num_all, num_held) if window else num_all
    return num_blocks


# Asked several times for each request, with the same answer as long as the pool keeps its size.
@functools.lru_cache(maxsize=256)
def _num_tokens_fitting(
    windows: tuple[int, ...],
    block_size: int,
    num_step_tokens: int,
    num_blocks: int,
    max_model_len: int,
) -> int:
    """As ``ReplicaFacts.num_tokens_fitting``."""
    sizes = range(1 + max(num_blocks, ceil_div(max_model_len, block_size)))
    num_each = bisect_right(
        sizes,
        num_blocks,
        key=lambda size: _num_blocks_peak(windows, block_size, num_step_tokens, size),
    )
    return (num_each - 1) * block_size
