"""ALiBi: scores fall with distance instead of heads being rotated (Press et al., arXiv 2108.12409).

A score of a query at position ``i`` and a key at ``j`` loses ``slope * (i - j)``. The softmax does
not see what a row has in common, so a bias ``slope * j`` of the key alone does the same: no query
is asked for its position, and one row of biases for each head serves every sequence.
"""

import torch

_NUM_KEYS_MIN = 1024


class Alibi:
    """The slopes of all query heads.

    Args:
        slopes: shape (num_heads,), on the device of the scores. Biases of keys are rounded to
            their type: Hugging Face computes those of Falcon in bfloat16.
        scale: Multiplies biases; Falcon scales them as it scales scores.

    Attributes:
        slopes: float32, shape (num_heads,), contiguous: what scores, already scaled, lose per
            position of distance. What is made of these is not rounded.
    """

    def __init__(self, slopes: torch.Tensor, scale: float = 1.0) -> None:
        self.slopes = (slopes.float() * scale).contiguous()
        self._rounded = slopes
        self._scale = scale
        self._biases = torch.empty(slopes.shape[0], 0, device=slopes.device)

    def key_bias(self, num_keys: int) -> torch.Tensor:
        """What scores of keys at positions ``[0, num_keys)`` gain: float32, (num_heads, num_keys).

        Computed once for each power of two, and kept.
        """
        if self._biases.shape[1] < num_keys:
            capacity = max(_NUM_KEYS_MIN, 1 << (num_keys - 1).bit_length())
            positions = torch.arange(capacity, device=self._rounded.device)
            self._biases = (self._rounded[:, None] * positions).float() * self._scale
        return self._biases[:, :num_keys]
