"""Reference of ``ops.swiglu``: by the formula, in double precision."""

import torch


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Arguments as in ``ops.swiglu``; result in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1.0 + torch.exp(-gate)) * up
