"""Rotary position embedding: inverse frequencies, and the rotation of query and key heads.

Angles are computed in float32 for the positions of each step, so no table bounds the context.
"""

import math
from collections.abc import Mapping

import torch

from pageframe.core.errors import UnimplementedError

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(
    head_dim: int, rope_type: str, parameters: Mapping[str, float]
) -> torch.Tensor:
    """Angle per position of each channel pair, float32, shape (head_dim / 2,).

    Args:
        head_dim: Channels per head, all of them rotated.
        rope_type: One of ``ROPE_TYPES``; ``llama3`` stretches long wavelengths (Llama 3.1).
        parameters: ``rope_theta`` and what the type needs, as in a Hugging Face config.

    Raises:
        UnimplementedError: another type.
    """
    # The same operations in the same order as transformers, so that float32 angles are equal.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (float(parameters["rope_theta"]) ** exponents)
    if rope_type == "default":
        return frequencies
    if rope_type == "linear":
        return frequencies / parameters["factor"]
    if rope_type == "llama3":
        return _stretch_long_wavelengths(frequencies, parameters)
    raise UnimplementedError(
        "ROPE_TYPE_UNAVAILABLE",
        f"rope type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}",
        rope_type=rope_type,
    )


def _stretch_long_wavelengths(
    frequencies: torch.Tensor, parameters: Mapping[str, float]
) -> torch.Tensor:
    """Llama 3.1: divide low frequencies by ``factor``, keep high ones, blend between."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    trained_len = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > trained_len / low, frequencies / factor, frequencies)
    smooth = (trained_len / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (wavelengths >= trained_len / high) & (wavelengths <= trained_len / low)
    return torch.where(is_between, blended, stretched)


class RotaryAngles:
    """Cosines and sines of one step's positions.

    Attributes:
        cosines: shape (T, 1, head_dim), both halves alike.
        sines: shape (T, 1, head_dim / 2).
    """

    __slots__ = ("cosines", "sines")

    def __init__(
        self, positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
    ) -> None:
        angles = positions.float()[:, None, None] * frequencies
        cosines = angles.cos()
        self.cosines = torch.cat((cosines, cosines), dim=-1).to(dtype)
        self.sines = angles.sin().to(dtype)

    def rotate(self, heads: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Rotate ``heads``, shape (T, num_heads, head_dim), into ``out`` of the same shape.

        Channel ``c`` pairs with ``c + head_dim / 2``, as in Hugging Face checkpoints.
        """
        half = heads.shape[-1] // 2
        torch.mul(heads, self.cosines, out=out)
        out[..., :half].addcmul_(heads[..., half:], self.sines, value=-1)
        out[..., half:].addcmul_(heads[..., :half], self.sines)
        return out
