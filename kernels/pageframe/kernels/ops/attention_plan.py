"""What depends on lengths and block tables alone, worked out once per step and window size.

A layer's work is cut into two kinds of pieces, by the number of new tokens and nothing else: groups
of sequences with one new token each, and chunks of one sequence. ``paged_attention`` runs them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# A group's keys should stay in the second-level cache between gather and product.
_GROUP_TOKENS_MAX = 4096
# Sequences share a call while the shortest fills at least this part of the longest.
_GROUP_FILL_MIN = 0.75


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each that share an SDPA call.

    Attributes:
        tokens: int64 [B], their tokens in the batch.
        block_ids: int64 [B * W], blocks to gather, padded with blocks of the sequence itself.
        num_keys: Keys per sequence that the call sees, at most ``W * block_size``.
        stale: int64 [N], gathered places that hold no key of their sequence, in
            ``[0, B * W * block_size)``; None when all lengths are equal.
        mask: float [B, 1, 1, num_keys], minus infinity at stale places; None likewise.
        first_key: Gathered places to skip at the front; only without a mask.
    """

    tokens: torch.Tensor
    block_ids: torch.Tensor
    first_key: int
    num_keys: int
    stale: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several new tokens.

        position      0 ... first_key ........ first_query ............ context_len
        gathered            [ k  k  k  k  k  k  k  k  k  k  k  k  k  k )
        new tokens                             [ q  q  q  q  q  q  q  q )

    Attributes:
        first_token: Its first token in the batch.
        num_tokens: Its new tokens.
        first_query: Position of the first new token.
        first_key: Position of the first gathered key, a multiple of the block size.
        block_ids: int64 [W], blocks to gather.
    """

    first_token: int
    num_tokens: int
    first_query: int
    first_key: int
    block_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers with the same window do in one step."""

    window: int | None
    groups: list[DecodeGroup]
    chunks: list[Chunk]


class AttentionPlanner:
    """Cuts steps into pieces.

    Args:
        block_size: Tokens per block.
        dtype: Of masks.
        device: Where the pieces' lists and masks shall lie.
    """

    def __init__(self, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block_size = block_size
        self._dtype = dtype
        self._device = device

    def plan(
        self,
        *,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        window: int | None,
    ) -> AttentionPlan:
        """Work out gathers and masks of one step; arguments as in the reference.

        The plan holds no views of its arguments.
        """
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; at least the token itself must be seen")
        query_lens = np.diff(query_start)
        return AttentionPlan(
            window=window,
            groups=self._plan_groups(
                np.flatnonzero(query_lens == 1), query_start, context_lens, block_tables, window
            ),
            chunks=[
                self._plan_chunk(
                    int(query_start[sequence]),
                    int(query_lens[sequence]),
                    int(context_lens[sequence]),
                    block_tables[sequence],
                    window,
                )
                for sequence in np.flatnonzero(query_lens > 1)
            ],
        )

    def _plan_groups(
        self,
        sequences: NDArray[np.intp],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        window: int | None,
    ) -> list[DecodeGroup]:
        """Cut sequences, longest first, into runs of similar numbers of blocks."""
        if sequences.size == 0:
            return []
        lens = context_lens[sequences].astype(np.int64)
        first_keys = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
        first_blocks = first_keys // self._block_size
        num_blocks = -(-lens // self._block_size) - first_blocks
        order = np.argsort(-num_blocks, kind="stable")
        groups = []
        start = 0
        while start < order.size:
            widest = int(num_blocks[order[start]])
            num_sequences_max = max(1, _GROUP_TOKENS_MAX // (widest * self._block_size))
            candidates = order[start : start + num_sequences_max]
            # One block is always granted: short sequences differ by a block all the time.
            fits = num_blocks[candidates] >= min(widest * _GROUP_FILL_MIN, widest - 1)
            taken = candidates[: int(np.count_nonzero(fits))]
            groups.append(
                self._plan_group(
                    tokens=query_start[sequences[taken]].astype(np.int64),
                    tables=block_tables[sequences[taken]],
                    first_blocks=first_blocks[taken],
                    num_blocks=num_blocks[taken],
                    visible=np.stack([first_keys[taken], lens[taken]]),
                )
            )
            start += taken.size
        return groups

    def _plan_group(
        self,
        *,
        tokens: NDArray[np.int64],
        tables: NDArray[np.int32],
        first_blocks: NDArray[np.int64],
        num_blocks: NDArray[np.int64],
        visible: NDArray[np.int64],
    ) -> DecodeGroup:
        """Gather list and mask; ``visible`` holds first and end position seen by each sequence."""
        width = int(num_blocks.max())
        columns = np.minimum(np.arange(width), num_blocks[:, None] - 1) + first_blocks[:, None]
        block_ids = np.take_along_axis(tables, columns, axis=1).astype(np.int64)
        first, end = visible - first_blocks * self._block_size
        place = np.arange(width * self._block_size)
        is_stale = (place < first[:, None]) | (place >= end[:, None])
        num_keys = int(end.max())
        is_ragged = bool((first != first[0]).any() or (end != end[0]).any())
        mask = stale = None
        first_key = int(first[0])
        if is_ragged:
            first_key = 0
            stale = self._to_device(np.flatnonzero(is_stale))
            additive = np.where(is_stale[:, :num_keys], -np.inf, 0.0).astype(np.float32)
            mask = self._to_device(additive)[:, None, None, :].to(self._dtype)
        return DecodeGroup(
            tokens=self._to_device(tokens),
            block_ids=self._to_device(block_ids.reshape(-1)),
            first_key=first_key,
            num_keys=num_keys - first_key,
            stale=stale,
            mask=mask,
        )

    def _plan_chunk(
        self,
        first_token: int,
        num_tokens: int,
        context_len: int,
        table: NDArray[np.int32],
        window: int | None,
    ) -> Chunk:
        first_query = context_len - num_tokens
        first_block = 0 if window is None else max(0, first_query - window + 1) // self._block_size
        end_block = -(-context_len // self._block_size)
        return Chunk(
            first_token=first_token,
            num_tokens=num_tokens,
            first_query=first_query,
            first_key=first_block * self._block_size,
            block_ids=self._to_device(table[first_block:end_block].astype(np.int64)),
        )

    def _to_device(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
