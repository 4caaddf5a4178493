"""The best tokens of rows of logits, without sorting the vocabulary.

Both searches look at the maxima of short blocks first: a token can only be among the best C if
its block's maximum is among the best C maxima. What is left to search is a few hundred to a few
thousand numbers instead of the whole vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.errors import InternalError

# Widths balance the pass over the vocabulary (wide is faster) against what the winners hold.
_ARGMAX_BLOCK = 256
_BEST_BLOCK = 32


def best_token(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logit of each row and the lowest token id that has it.

    Args:
        logits: float32 [n, V].

    Returns:
        Maxima float32 [n], NaN where the row holds a NaN, and token ids int64 [n].
    """
    if logits.device.type == "cpu":
        return _best_token_on_host(logits)
    return best_token_by_blocks(logits)


def _best_token_on_host(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``best_token`` on this thread alone.

    PyTorch would share even one row with its other threads, and wake them for that.
    """
    rows = logits.numpy()
    # The first of equals, as NumPy promises; a NaN is greater than all.
    ids = rows.argmax(1)
    return torch.from_numpy(rows[np.arange(len(rows)), ids]), torch.from_numpy(ids)


def best_token_by_blocks(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``best_token`` in operations that a device has; on a host it finds the same."""
    vocab_size = logits.shape[1]
    maxima = reduce_blocks(logits, _ARGMAX_BLOCK, torch.amax)
    # argmax answers with the first of equals, here and inside the block: the lowest id.
    block = maxima.argmax(1, keepdim=True)
    ids = torch.arange(_ARGMAX_BLOCK, device=logits.device) + block * _ARGMAX_BLOCK
    # Past the end the last token repeats itself; the first of equals is the real one.
    ids.clamp_(max=vocab_size - 1)
    offset = logits.gather(1, ids).argmax(1, keepdim=True)
    return maxima.gather(1, block).squeeze(1), ids.gather(1, offset).squeeze(1)


def best_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest logits of each row, highest first, and their token ids.

    The values are exact. Which ids stand for values equal to the last one is not defined.

    Args:
        logits: float32 [n, V] without NaN.
        count: At most V.

    Returns:
        Values float32 [n, count] and token ids int64 [n, count].
    """
    vocab_size = logits.shape[1]
    if 2 * count * _BEST_BLOCK > vocab_size:
        best = logits.topk(count, 1)
        return best.values, best.indices
    whole = vocab_size // _BEST_BLOCK * _BEST_BLOCK
    in_blocks = logits[:, :whole].unflatten(1, (-1, _BEST_BLOCK))
    blocks = in_blocks.amax(2).topk(count, 1).indices
    row = torch.arange(len(logits), device=logits.device)[:, None]
    # What does not fill a block is always looked at.
    values = torch.cat((in_blocks[row, blocks].flatten(1), logits[:, whole:]), 1)
    best = values.topk(count, 1)

    place = best.indices
    block = blocks.gather(1, (place // _BEST_BLOCK).clamp(max=count - 1))
    inside = block * _BEST_BLOCK + place % _BEST_BLOCK
    ids = inside.where(place < count * _BEST_BLOCK, place + (whole - count * _BEST_BLOCK))
    return best.values, ids


def sorted_values(logits: torch.Tensor) -> torch.Tensor:
    """All values of each row, highest first; no ids, for those nobody needs here."""
    if logits.device.type != "cpu":
        return logits.sort(1, descending=True).values
    # NumPy sorts bare floats with vector instructions: ten times faster than torch on a CPU.
    values: Any = (-logits).numpy()
    values.sort(1)
    return torch.from_numpy(values).neg_()


def reduce_blocks(
    rows: torch.Tensor, width: int, reduce: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """``reduce`` each block of ``width`` columns, the last one shorter: [n, ceil(V / width)].

    Args:
        rows: [n, V].
        width: Columns per block.
        reduce: As ``torch.amax`` or ``torch.sum``: called with a tensor, ``dim`` and ``keepdim``.
    """
    whole = rows.shape[1] // width * width
    parts = []
    if whole:
        parts.append(reduce(rows[:, :whole].unflatten(1, (-1, width)), dim=2))
    if whole < rows.shape[1]:
        parts.append(reduce(rows[:, whole:], dim=1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def check_finite(maxima: torch.Tensor | NDArray[np.float32], rows: NDArray[np.int32]) -> None:
    """Refuse logits from which no token can be chosen.

    Args:
        maxima: float32 [n], the best logit of each.
        rows: int32 [n], whose they are.

    Raises:
        InternalError: LOGITS_NOT_FINITE; limit ``rows`` names those, separated by commas.
    """
    found = maxima.cpu().numpy() if isinstance(maxima, torch.Tensor) else maxima
    is_finite = np.isfinite(found)
    if is_finite.all():
        return
    bad = sorted(set(rows[~is_finite].tolist()))
    raise InternalError(
        "LOGITS_NOT_FINITE",
        f"the model gave no finite best logit for row {', '.join(map(str, bad))}",
        rows=",".join(map(str, bad)),
    )
