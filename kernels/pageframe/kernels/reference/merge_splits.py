"""Reference of ``jit.merge_splits``: means weighted by sums of exponentials, in float64."""

import torch


def merge_splits(means: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Merge partial results of one token.

    Args:
        means: shape (parts, num_heads, head_dim).
        lse: shape (parts, num_heads), base 2; minus infinity for a part that saw nothing.

    Returns:
        float64, shape (num_heads, head_dim).
    """
    weights = torch.softmax(lse.double() * torch.log(torch.tensor(2.0).double()), dim=0)
    return (weights[..., None] * means.double()).sum(0)
