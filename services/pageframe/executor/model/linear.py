"""Linear layers of the native runner: plain, or with weights packed once for oneDNN."""

from functools import cache

import torch

from pageframe.kernels.scratch import Scratch

# The batch size that packed weights are laid out for; other sizes are right, too.
_PACK_FOR_NUM_ROWS = 16


class Linear:
    """``x @ weight.T + bias``.

    On a CPU, weights that are packed once save the reordering of each call; with float32 and 16
    rows that is a third to two thirds of the time. The packing operations are the ones that
    PyTorch's own compiler emits when it freezes weights. They are private, so the plain way stays.

    Args:
        weight: shape (num_outputs, num_inputs).
        bias: shape (num_outputs,), or None.
        scratch: Memory for results of the plain way.
        name: Buffer of that memory; layers that never live at once may share one.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch, name: str
    ) -> None:
        self._bias = bias
        self._scratch = scratch
        self._name = name
        self._num_outputs = weight.shape[0]
        self._is_packed = weight.device.type == "cpu" and can_pack(weight.dtype)
        # A packed tensor is opaque and replaces the weight, so memory does not double.
        self._weight = _pack(weight) if self._is_packed else weight.t()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply to ``rows``, shape (T, num_inputs), contiguous.

        Returns:
            shape (T, num_outputs); valid until the next call under the same name.
        """
        if self._is_packed:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
            return packed
        out = self._scratch.take(self._name, rows.shape[0], self._num_outputs)
        if self._bias is None:
            return torch.mm(rows, self._weight, out=out)
        return torch.addmm(self._bias, rows, self._weight, out=out)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's PyTorch packs weights of ``dtype`` and multiplies by them rightly."""
    try:
        weight = torch.eye(16, dtype=dtype)
        rows = torch.arange(32, dtype=dtype).view(2, 16)
        product = torch.ops.mkldnn._linear_pointwise(rows, _pack(weight), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.equal(product, rows))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.contiguous(), _PACK_FOR_NUM_ROWS
    )
    return packed
