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

A pool of another type than the computation's, quantised or not, is converted after the gather,
so that only narrow blocks cross from the pool; see ``kv_gather``.

A window reads no block that lies wholly before it: such blocks may be given away, and their
entries in the table be stale.

Moves, per layer and sequence: its keys and values once from the pool to scratch, once from there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.attention_plan import (
    AttentionPlan,
    AttentionPlanner,
    Chunk,
    DecodeGroup,
)
from pageframe.kernels.ops.kv_gather import KvGather
from pageframe.kernels.ops.quantise import check_scales
from pageframe.kernels.scratch import Scratch

_TILE_TOKENS_MAX = 128


@dataclass(frozen=True, slots=True)
class _Side:
    """Keys or values of one layer: shapes (num_blocks, block_size, num_kv_heads[, head_dim])."""

    name: str
    stored: torch.Tensor
    scales: torch.Tensor | None


class PagedAttention:
    """Plans and runs paged attention; owns the scratch memory of both.

    Args:
        block_size: Tokens per block.
        dtype: Of queries, and of keys and values once they are gathered.
        device: Where they lie.

    Attributes:
        dtype: As above.
    """

    def __init__(self, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._block_size = block_size
        self._device = device
        self._scratch = Scratch(dtype, device)
        self._gather = KvGather(dtype, device)
        self._planner = AttentionPlanner(block_size, dtype, device)
        self._toeplitz: dict[int | None, torch.Tensor] = {}

    def plan(
        self,
        *,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        window: int | None,
    ) -> AttentionPlan:
        """Work out gathers and masks of one step; see ``AttentionPlanner.plan``."""
        return self._planner.plan(
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            window=window,
        )

    def run(
        self,
        plan: AttentionPlan,
        query: torch.Tensor,
        layer: torch.Tensor,
        scale: float,
        *,
        kv_scales: torch.Tensor | None = None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Attend in one layer.

        Args:
            plan: Of this step, for this layer's window.
            query: shape (T, num_heads, head_dim), of ``dtype``.
            layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), any strides.
            scale: Multiplies scores before the softmax.
            kv_scales: float32, shape (num_blocks, 2, block_size, num_kv_heads), any strides; None
                exactly if ``layer`` is of no quantised type.
            alibi: How scores fall with distance; None for not at all.

        Returns:
            shape (T, num_heads, head_dim), scratch memory: valid until the next run.

        Raises:
            ValueError: shapes that do not belong together.
        """
        _check_run(query, layer, self._block_size)
        check_scales(layer, kv_scales)
        sides = _sides(layer, kv_scales)
        output = self._scratch.take("output", *query.shape)
        for group in plan.groups:
            self._run_group(group, query, sides, scale, alibi, output)
        for chunk in plan.chunks:
            self._run_chunk(chunk, plan.window, query, sides, scale, alibi, output)
        return output

    def _run_group(
        self,
        group: DecodeGroup,
        query: torch.Tensor,
        sides: list[_Side],
        scale: float,
        alibi: Alibi | None,
        output: torch.Tensor,
    ) -> None:
        num_sequences = group.tokens.shape[0]
        num_heads, head_dim = query.shape[1:]
        num_kv_heads = sides[0].stored.shape[2]
        gathered = []
        for side in sides:
            places = self._gather.gather(side.name, side.stored, side.scales, group.block_ids)
            if group.stale is not None:
                # A mask alone would not do: a stale place may hold an infinity or a NaN of
                # another sequence, and zero times that is NaN.
                places.index_fill_(0, group.stale, 0.0)
            by_sequence = places.view(num_sequences, -1, num_kv_heads, head_dim)
            gathered.append(
                by_sequence.narrow(1, group.first_key, group.num_keys).permute(0, 2, 1, 3)
            )
        mask = group.mask
        if alibi is not None:
            # Places stand for positions: a sequence whose first place lies later has all of its
            # biases lower by the same, which the softmax does not see.
            bias = _key_bias(alibi, 0, group.num_keys, num_kv_heads)[None, :, :, 0]
            mask = bias if mask is None else bias + mask
        packed = query.index_select(0, group.tokens)
        mixed = scaled_dot_product_attention(
            packed.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim),
            gathered[0],
            gathered[1],
            attn_mask=mask,
            scale=scale,
        )
        output.index_copy_(0, group.tokens, mixed.reshape(num_sequences, num_heads, head_dim))

    def _run_chunk(
        self,
        chunk: Chunk,
        window: int | None,
        query: torch.Tensor,
        sides: list[_Side],
        scale: float,
        alibi: Alibi | None,
        output: torch.Tensor,
    ) -> None:
        num_heads, head_dim = query.shape[1:]
        num_kv_heads = sides[0].stored.shape[2]
        group_size = num_heads // num_kv_heads
        keys, values = (
            self._gather.gather(side.name, side.stored, side.scales, chunk.block_ids)
            .permute(1, 0, 2)[:, None]
            .expand(-1, group_size, -1, -1)
            for side in sides
        )
        for first in range(0, chunk.num_tokens, _TILE_TOKENS_MAX):
            num_tokens = min(_TILE_TOKENS_MAX, chunk.num_tokens - first)
            tokens = slice(chunk.first_token + first, chunk.first_token + first + num_tokens)
            # The first query of the tile stands at this gathered place.
            diagonal = chunk.first_query + first - chunk.first_key
            low = 0 if window is None else max(0, diagonal - window + 1)
            high = diagonal + num_tokens
            mask = self._tile_mask(num_tokens, diagonal - low, high - low, window)
            if alibi is not None:
                mask = _key_bias(alibi, low, high, num_kv_heads) + mask
            mixed = scaled_dot_product_attention(
                query[tokens].unflatten(1, (num_kv_heads, group_size)).permute(1, 2, 0, 3),
                keys[:, :, low:high],
                values[:, :, low:high],
                attn_mask=mask,
                scale=scale,
            )
            output[tokens] = mixed.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)

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
            band = torch.zeros(is_hidden.shape, dtype=self.dtype)
            band = band.masked_fill_(is_hidden, -torch.inf).to(self._device)
            self._toeplitz[window] = band
        return band[:num_rows, reach - diagonal : reach - diagonal + num_keys]


def _key_bias(alibi: Alibi, low: int, high: int, num_kv_heads: int) -> torch.Tensor:
    """Biases of keys ``[low, high)``: shape (num_kv_heads, group, 1, high - low)."""
    return alibi.key_bias(high)[:, low:].unflatten(0, (num_kv_heads, -1))[:, :, None]


def _sides(layer: torch.Tensor, kv_scales: torch.Tensor | None) -> list[_Side]:
    return [
        _Side(name, layer[:, side], None if kv_scales is None else kv_scales[:, side])
        for side, name in enumerate(("keys", "values"))
    ]


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
