"""Keep numbers in one byte each, with one scale per row: symmetric int8, or fp8 (e4m3).

    stored = round(row / scale),   scale = largest magnitude of the row / largest stored number

A row is one token's keys, or values, of one head. A scale per row needs no calibration, is never
changed by a later token, and travels with its block; vLLM offers the same as "per token and head".
"""

import torch

from pageframe.kernels.layouts import QUANTISED_DTYPES, SCALE_DTYPE

STORED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A row of zeros has no scale of its own; this one keeps its quotients at zero.
_SCALE_MIN = torch.finfo(SCALE_DTYPE).tiny


def quantise(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension; a row with a NaN or an infinity gets no finite scale.

    Args:
        rows: shape (..., head_dim), any floating type.
        dtype: int8 or float8_e4m3fn.

    Returns:
        The stored numbers, shape (..., head_dim), and their scales, float32, shape (...).

    Raises:
        ValueError: ``dtype`` is no quantised type.
    """
    if dtype not in STORED_MAX:
        raise ValueError(f"{dtype} is no quantised type; {', '.join(map(str, STORED_MAX))} are")
    exact = rows.to(SCALE_DTYPE)
    # Twice as fast on a CPU as one maximum norm.
    scales = exact.abs().amax(-1).div_(STORED_MAX[dtype]).clamp_min_(_SCALE_MIN)
    quotients = exact / scales[..., None]
    # A quotient passes the largest stored number by a rounding error at most, which rounds back;
    # conversion to fp8 rounds by itself.
    if dtype == torch.int8:
        quotients.round_()
    return quotients.to(dtype), scales


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """The same memory as int8: few operations know float8, and moving bytes needs none."""
    return stored.view(torch.int8)


def check_scales(stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Check that scales are there exactly if needed, one for each row of ``stored``.

    Raises:
        ValueError: they are not.
    """
    if (scales is not None) != (stored.dtype in QUANTISED_DTYPES):
        raise ValueError(
            f"{'scales' if scales is not None else 'no scales'} for numbers of {stored.dtype}"
        )
    if scales is not None and scales.shape != stored.shape[:-1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit {tuple(stored.shape)}")
