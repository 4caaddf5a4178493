"""Reference of ``ops.residual_norm``: by the formula, in double precision."""

import torch


def residual_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in ``ops.residual_norm``, none changed.

    Returns:
        The new hidden states in their own type, and the normalised ones in float64.
    """
    if delta is not None:
        hidden = (hidden.double() + delta.double()).to(hidden.dtype)
    exact = hidden.double()
    mean_square = exact.square().mean(-1, keepdim=True)
    return hidden, exact / torch.sqrt(mean_square + epsilon) * weight.double()
