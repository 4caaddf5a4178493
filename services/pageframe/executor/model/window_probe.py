"""How far back a model looks, seen from what it asks of paged attention.

Each family says in its config in its own words which layers have a sliding window, and since when
that counts. A block that is given up because of a window must never be read again, so what counts
is what the layers ask for: one token is run through the model, and their calls are written down.
"""

import torch

from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.kernels.ops.alibi import Alibi


class _WindowRecorder(PagedKv):
    """Has no arena: keeps the window of each call and answers with zeros."""

    def __init__(self) -> None:
        self.windows: dict[int, int | None] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Note ``window``; zeros, shape (T, num_heads, head_dim)."""
        self.windows[layer_index] = window
        return query.new_zeros(query.shape)


def probe_windows(decoder: Decoder, device: torch.device) -> list[int]:
    """Positions that a token sees in each layer, itself included; 0 for all."""
    recorder = _WindowRecorder()
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        decoder.forward(recorder, zero, zero, zero)
    return [recorder.windows[layer] or 0 for layer in range(decoder.kv_shape.num_layers)]
