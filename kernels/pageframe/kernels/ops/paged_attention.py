"""Causal attention of new tokens over paged keys and values, by gather and SDPA.

Plan, then run, as FlashInfer does it: what depends on lengths and block tables is worked out once
per step (and per window size) on the CPU; each layer then only moves and multiplies.

A layer's work is cut into two kinds of pieces, by the number of new tokens and nothing else:

    one new token        sequences of similar length, longest first, share one SDPA call
                         query  [B, num_kv_heads, group, head_dim]   heads of a group are rows
                         keys   [B, num_kv_heads, W * block_size, head_dim], stale places masked
    several new tokens   one sequence, its queries in tiles
                         query  [num_kv_heads, group, tile, head_dim]
                         keys   [num_kv_heads, group, L, head_dim], groups share by a stride of 0

Packing a group's heads into rows (or sharing by stride) is what makes grouped heads cheap:
``enable_gqa`` repeats keys and values, 10 to 20 times slower for one-token queries on a CPU.

Blocks are gathered into *reused* scratch memory. Measured on one thread, 8 sequences of 1,024
tokens, 8 KV heads of 128, float32: 5.8 ms, against 9.9 ms with fresh buffers and 54 ms with one
gather of the whole batch; hence also the limit on the size of a group.

Moves, per layer and sequence: its keys and values once from the pool to scratch, once from there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from pageframe.kernels.scratch import Scratch

# A group's keys should stay in the second-level cache between gather and product.
_GROUP_TOKENS_MAX = 4096
# Sequences share a call while the shortest fills at least this part of the longest.
_GROUP_FILL_MIN = 0.75
_TILE_TOKENS_MAX = 128


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


class PagedAttention:
    """Plans and runs paged attention; owns the scratch memory of both.

    Args:
        block_size: Tokens per block.
        dtype: Of queries, keys and values.
        device: Where they lie.
    """

    def __init__(self, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._scratch = Scratch(dtype, device)
        self._toeplitz: dict[int | None, torch.Tensor] = {}

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

    def run(
        self, plan: AttentionPlan, query: torch.Tensor, layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend in one layer.

        Args:
            plan: Of this step, for this layer's window.
            query: shape (T, num_heads, head_dim).
            layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), any strides.
            scale: Multiplies scores before the softmax.

        Returns:
            shape (T, num_heads, head_dim), scratch memory: valid until the next run.

        Raises:
            ValueError: shapes that do not belong together.
        """
        _check_run(query, layer, self._block_size)
        output = self._scratch.take("output", *query.shape)
        for group in plan.groups:
            self._run_group(group, query, layer, scale, output)
        for chunk in plan.chunks:
            self._run_chunk(chunk, plan.window, query, layer, scale, output)
        return output

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

    def _run_group(
        self,
        group: DecodeGroup,
        query: torch.Tensor,
        layer: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        num_sequences = group.tokens.shape[0]
        num_heads, head_dim = query.shape[1:]
        num_kv_heads = layer.shape[3]
        sides = []
        for side, name in enumerate(("keys", "values")):
            places = self._gather(name, layer[:, side], group.block_ids)
            if group.stale is not None:
                # A mask alone would not do: a stale place may hold an infinity or a NaN of
                # another sequence, and zero times that is NaN.
                places.index_fill_(0, group.stale, 0.0)
            by_sequence = places.view(num_sequences, -1, num_kv_heads, head_dim)
            sides.append(by_sequence.narrow(1, group.first_key, group.num_keys).permute(0, 2, 1, 3))
        packed = query.index_select(0, group.tokens)
        mixed = scaled_dot_product_attention(
            packed.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim),
            sides[0],
            sides[1],
            attn_mask=group.mask,
            scale=scale,
        )
        output.index_copy_(0, group.tokens, mixed.reshape(num_sequences, num_heads, head_dim))

    def _run_chunk(
        self,
        chunk: Chunk,
        window: int | None,
        query: torch.Tensor,
        layer: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        num_heads, head_dim = query.shape[1:]
        num_kv_heads = layer.shape[3]
        group_size = num_heads // num_kv_heads
        keys, values = (
            self._gather(name, layer[:, side], chunk.block_ids)
            .permute(1, 0, 2)[:, None]
            .expand(-1, group_size, -1, -1)
            for side, name in enumerate(("keys", "values"))
        )
        for first in range(0, chunk.num_tokens, _TILE_TOKENS_MAX):
            num_tokens = min(_TILE_TOKENS_MAX, chunk.num_tokens - first)
            tokens = slice(chunk.first_token + first, chunk.first_token + first + num_tokens)
            # The first query of the tile stands at this gathered place.
            diagonal = chunk.first_query + first - chunk.first_key
            low = 0 if window is None else max(0, diagonal - window + 1)
            high = diagonal + num_tokens
            mixed = scaled_dot_product_attention(
                query[tokens].unflatten(1, (num_kv_heads, group_size)).permute(1, 2, 0, 3),
                keys[:, :, low:high],
                values[:, :, low:high],
                attn_mask=self._tile_mask(num_tokens, diagonal - low, high - low, window),
                scale=scale,
            )
            output[tokens] = mixed.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)

    def _gather(self, name: str, side: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        """Blocks of keys or of values as [len(block_ids) * block_size, num_kv_heads, head_dim]."""
        blocks = self._scratch.take(name, block_ids.shape[0], *side.shape[1:])
        torch.index_select(side, 0, block_ids, out=blocks)
        return blocks.flatten(0, 1)

    def _tile_mask(
        self, num_rows: int, diagonal: int, num_keys: int, window: int | None
    ) -> torch.Tensor:
        """Mask [num_rows, num_keys]: row ``i`` sees keys ``(diagonal + i - window, diagonal + i]``.

        What a row sees depends only on the distance to the diagonal, so all masks are cut from
        one wide band: key ``j`` of a tile is column ``j + reach - diagonal`` of the band.

            row i of the band    0 ............................. i + reach + 1 ... reach + tile
                                 [ past the window ..)[ seen ............)[ hidden .........)
        """
        band = self._toeplitz.get(window)
        reach = 0 if band is None else band.shape[1] - _TILE_TOKENS_MAX
        if band is None or reach < diagonal:
            reach = max(1024, 1 << diagonal.bit_length())
            column = torch.arange(reach + _TILE_TOKENS_MAX) - reach
            distance = torch.arange(_TILE_TOKENS_MAX)[:, None] - column
            is_hidden = distance < 0
            if window is not None:
                is_hidden |= distance >= window
            band = torch.zeros(is_hidden.shape, dtype=self._dtype)
            band = band.masked_fill_(is_hidden, -torch.inf).to(self._device)
            self._toeplitz[window] = band
        return band[:num_rows, reach - diagonal : reach - diagonal + num_keys]

    def _to_device(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _check_run(query: torch.Tensor, layer: torch.Tensor, block_size: int) -> None:
    if layer.dim() != 5 or layer.shape[1] != 2 or layer.shape[2] != block_size:
        raise ValueError(
            f"layer has shape {tuple(layer.shape)} for blocks of {block_size}; see layouts.py"
        )
    if query.dim() != 3 or query.shape[2] != layer.shape[4]:
        raise ValueError(f"query {tuple(query.shape)} does not fit layer {tuple(layer.shape)}")
    if query.shape[1] % layer.shape[3]:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {layer.shape[3]} key heads evenly"
        )
