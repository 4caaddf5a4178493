"""Which paged attention runs where: Triton's kernels on GPUs that have them, PyTorch elsewhere."""

from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.paged_attention import PagedAttention


class Attention(Protocol):
    """Plan once per step and window, then run each layer; see ``reference.paged_attention``.

    Attributes:
        dtype: Of queries.
    """

    dtype: torch.dtype

    def plan(
        self,
        *,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        window: int | None,
    ) -> Any:
        """What ``run`` needs to know of a step."""

    def run(
        self,
        plan: Any,
        query: torch.Tensor,
        layer: torch.Tensor,
        scale: float,
        *,
        kv_scales: torch.Tensor | None = None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Attend in one layer."""


def choose_attention(
    layout: KvLayout,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_deterministic: bool = False,
) -> Attention:
    """Attention for a pool on a device.

    Args:
        layout: Of the pool's blocks.
        num_heads: Query heads.
        dtype: Of queries.
        device: Where they and the pool lie.
        is_deterministic: Whether a sequence's result must not depend on its batch; on PyTorch it
            may.
    """
    # Triton comes with PyTorch for CUDA, and is not needed elsewhere.
    if device.type == "cuda" and find_spec("triton") is not None:
        from pageframe.kernels.ops.triton_attention import TritonAttention
        from pageframe.kernels.ops.triton_attention_checks import fits_device

        if fits_device(device, dtype, layout):
            return TritonAttention(
                layout, num_heads, dtype, device, is_deterministic=is_deterministic
            )
    return PagedAttention(layout.block_size, dtype, device)
