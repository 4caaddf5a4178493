"""Every variant of the small kernels that serving compiles: norm, rotary, SwiGLU, moves, sampling.

Shapes are those of Llama 3 8B, which no other model's sizes are harder than, and for the widest
rows those of 70B and 405B models. Other sizes of heads and rows change constants, not the code.
"""

from collections.abc import Mapping

from pageframe.kernels.jit import choose_token, move_rows, residual_norm, rotary_write, swiglu
from pageframe.kernels.jit.variants import (
    BF16_CAPABILITY_MIN,
    FP8_CAPABILITY_MIN,
    Gate,
    Variant,
)

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 16
_ROW_SIZES = (4096, 8192, 16384)
# Stored type: its largest number, and whether it is an integer; as in ops/quantise.py.
_STORED = {"i8": (127.0, True), "fp8e4nv": (448.0, False)}
# Enough programs fit into an SM at once to keep its memory pipes full.
_GATE = Gate(registers_max=128)


def small_variants(capability: int) -> list[Variant]:
    """Variants for one compute capability, times ten."""
    dtype = "bf16" if capability >= BF16_CAPABILITY_MIN else "fp16"
    stored = [dtype, "i8", *(["fp8e4nv"] if capability >= FP8_CAPABILITY_MIN else [])]
    return [
        _move_rows(capability),
        _swiglu(capability, dtype),
        *(_residual_norm(capability, dtype, size, has_delta=True) for size in _ROW_SIZES),
        _residual_norm(capability, dtype, _ROW_SIZES[0], has_delta=False),
        *(_rotary_write(capability, dtype, kind, has_norm=False) for kind in stored),
        _rotary_write(capability, dtype, dtype, has_norm=True),
        _choose_token(capability),
    ]


def _move_rows(capability: int) -> Variant:
    signature = {
        "source": "*i32",
        "source_ids": "*i64",
        "target": "*i32",
        "target_ids": "*i64",
        "source_row_words": "i32",
        "target_row_words": "i32",
        "num_words": "i32",
        "SLICE_WORDS": "constexpr",
    }
    return Variant(
        name="move_rows",
        kernel=move_rows.move_rows,
        signature=signature,
        constexprs={"SLICE_WORDS": move_rows.SLICE_WORDS},
        divisible_by_16=_all_but_constants(signature),
        capability=capability,
        num_warps=move_rows.NUM_WARPS,
        gate=_GATE,
    )


def _swiglu(capability: int, dtype: str) -> Variant:
    signature = {
        "gate_up": f"*{dtype}",
        "out": f"*{dtype}",
        "gate_up_stride": "i32",
        "out_stride": "i32",
        "num_channels": "i32",
        "TILE": "constexpr",
    }
    return Variant(
        name=f"swiglu {dtype}",
        kernel=swiglu.swiglu,
        signature=signature,
        constexprs={"TILE": swiglu.TILE},
        divisible_by_16=_all_but_constants(signature),
        capability=capability,
        num_warps=swiglu.NUM_WARPS,
        gate=_GATE,
    )


def _residual_norm(capability: int, dtype: str, size: int, *, has_delta: bool) -> Variant:
    signature = {
        **dict.fromkeys(("hidden", "delta", "weight", "normed"), f"*{dtype}"),
        **dict.fromkeys(("hidden_stride", "delta_stride", "normed_stride"), "i32"),
        "epsilon": "fp32",
        **dict.fromkeys(("SIZE", "TILE", "HAS_DELTA"), "constexpr"),
    }
    return Variant(
        name=f"residual_norm {dtype} {size}{'' if has_delta else ' alone'}",
        kernel=residual_norm.residual_norm,
        signature=signature,
        constexprs={"SIZE": size, "TILE": size, "HAS_DELTA": has_delta},
        divisible_by_16=_all_but_constants(signature),
        capability=capability,
        num_warps=residual_norm.num_warps_of(size),
        gate=_GATE,
    )


def _rotary_write(capability: int, dtype: str, stored: str, *, has_norm: bool) -> Variant:
    stored_max, is_integer = _STORED.get(stored, (0.0, False))
    half = _HEAD_DIM // 2
    constants: dict[str, object] = {
        "NUM_HEADS": _NUM_HEADS,
        "NUM_KV_HEADS": _NUM_KV_HEADS,
        "HEAD_DIM": _HEAD_DIM,
        "HALF": half,
        "HEADS": rotary_write.heads_per_program(half),
        "BLOCK_SIZE": _BLOCK_SIZE,
        "STORED_MAX": stored_max,
        "IS_INTEGER": is_integer,
        "HAS_NORM": has_norm,
    }
    signature = {
        **dict.fromkeys(("heads", "cosines", "sines", "norm_weight", "rotated"), f"*{dtype}"),
        "layer": f"*{stored}",
        "scales": "*fp32",
        "slots": "*i64",
        **dict.fromkeys(("heads_stride", "cosines_stride", "sines_stride"), "i32"),
        **dict.fromkeys(("rotated_stride", "block_stride", "scale_block_stride"), "i32"),
        "epsilon": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    return Variant(
        name=f"rotary_write {dtype} to {stored}{' normed' if has_norm else ''}",
        kernel=rotary_write.rotary_write,
        signature=signature,
        constexprs=constants,
        divisible_by_16=_all_but_constants(signature),
        capability=capability,
        num_warps=1,
        gate=_GATE,
    )


def _choose_token(capability: int) -> Variant:
    signature = {
        "logits": "*fp32",
        "tokens": "*i32",
        "temperatures": "*fp32",
        "top_ks": "*i32",
        "top_ps": "*fp64",
        "min_ps": "*fp32",
        **dict.fromkeys(("seeds", "sample_indices", "positions"), "*i64"),
        "logits_stride": "i32",
        "vocab_size": "i32",
        "TILE": "constexpr",
    }
    return Variant(
        name="choose_token",
        kernel=choose_token.choose_token,
        signature=signature,
        constexprs={"TILE": choose_token.TILE},
        divisible_by_16=_all_but_constants(signature),
        capability=capability,
        num_warps=choose_token.NUM_WARPS,
        gate=_GATE,
    )


def _all_but_constants(signature: Mapping[str, str]) -> frozenset[str]:
    """Addresses and integers; sizes of models are multiples of 16, and so are blocks."""
    return frozenset(name for name, kind in signature.items() if kind not in ("constexpr", "fp32"))
