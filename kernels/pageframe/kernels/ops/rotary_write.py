"""Rotate queries and keys and write keys and values into their slots, on a device, in one pass."""

import torch

from pageframe.kernels.jit import rotary_write as kernel
from pageframe.kernels.ops.quantise import STORED_MAX, check_scales


def rotary_write(
    heads: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    rotated: torch.Tensor,
    layer: torch.Tensor,
    slots: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Write ``rotated`` queries, and ``layer`` and ``kv_scales`` at ``slots``.

    Args:
        heads: shape (T, num_heads + 2 * num_kv_heads, head_dim): queries, keys, values of a token,
            contiguous.
        cosines: shape (T, head_dim / 2), any floating type, contiguous in the last dimension.
        sines: as ``cosines``.
        rotated: shape (T, num_heads, head_dim); written and returned. May be the queries in
            ``heads``.
        layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim); blocks contiguous inside.
        slots: int64, shape (T,); a token with a slot below zero is not written.
        kv_scales: float32, shape (num_blocks, 2, block_size, num_kv_heads), blocks contiguous
            inside; None exactly if ``layer`` is of no quantised type.
        norm_weight: shape (num_heads + num_kv_heads, head_dim), contiguous: queries and keys are
            normalised first; None leaves them as they are.
        epsilon: Added to the mean of squares of a head that is normalised.

    Raises:
        ValueError: shapes or strides that do not belong together.
    """
    _check(heads, cosines, sines, rotated, layer, slots, norm_weight)
    check_scales(layer, kv_scales)
    if kv_scales is not None and not kv_scales[:1].is_contiguous():
        raise ValueError("the scales of a block must be contiguous")
    num_tokens, num_heads, head_dim = rotated.shape
    _, _, block_size, num_kv_heads, _ = layer.shape
    half = 1 << (head_dim // 2 - 1).bit_length()
    per_program = kernel.heads_per_program(half)
    num_programs = -(-num_heads // per_program) + 2 * -(-num_kv_heads // per_program)
    if num_tokens:
        kernel.rotary_write[num_tokens, num_programs](
            heads,
            cosines,
            sines,
            heads if norm_weight is None else norm_weight,
            rotated,
            layer,
            layer if kv_scales is None else kv_scales,
            slots,
            heads.stride(0),
            cosines.stride(0),
            sines.stride(0),
            rotated.stride(0),
            layer.stride(0),
            0 if kv_scales is None else kv_scales.stride(0),
            epsilon,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            HEADS=per_program,
            BLOCK_SIZE=block_size,
            STORED_MAX=STORED_MAX.get(layer.dtype, 0.0),
            IS_INTEGER=layer.dtype == torch.int8,
            HAS_NORM=norm_weight is not None,
            num_warps=1,
        )
    return rotated


def _check(
    heads: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    rotated: torch.Tensor,
    layer: torch.Tensor,
    slots: torch.Tensor,
    norm_weight: torch.Tensor | None,
) -> None:
    if layer.dim() != 5 or layer.shape[1] != 2 or not layer[:1].is_contiguous():
        raise ValueError(f"layer has shape {tuple(layer.shape)}, strides {layer.stride()}")
    num_tokens, num_heads, head_dim = rotated.shape
    num_kv_heads = layer.shape[3]
    if head_dim % 2 or layer.shape[4] != head_dim:
        raise ValueError(f"heads of {head_dim} channels beside a layer of {layer.shape[4]}")
    expected = (num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    if tuple(heads.shape) != expected:
        raise ValueError(f"heads {tuple(heads.shape)} must be {expected}")
    for angles in (cosines, sines):
        if tuple(angles.shape) != (num_tokens, head_dim // 2) or angles.stride(1) != 1:
            raise ValueError(f"angles {tuple(angles.shape)} for {num_tokens} tokens of {head_dim}")
    if slots.shape != (num_tokens,):
        raise ValueError(f"{slots.shape[0]} slots for {num_tokens} tokens")
    for tokens in (heads, rotated):
        if not tokens[:1].is_contiguous():
            raise ValueError(f"heads of a token have strides {tokens.stride()}")
    if norm_weight is not None and (
        tuple(norm_weight.shape) != (num_heads + num_kv_heads, head_dim)
        or not norm_weight.is_contiguous()
    ):
        raise ValueError(f"norm weights {tuple(norm_weight.shape)} do not fit {expected}")
