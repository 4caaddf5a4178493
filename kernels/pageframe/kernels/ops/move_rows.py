"""Move rows of bytes on a device with one launch: block copies, and swaps through staging memory.

Moves C rows, each read once and written once. ``ops.copy_blocks`` calls this for blocks on a GPU.
"""

import torch

from pageframe.kernels.jit import move_rows as kernel

_WORD = torch.int32


def move_rows(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Copy row ``source_ids[i]`` of ``source`` to row ``target_ids[i]`` of ``target``.

    Gathers blocks into staging memory and scatters them from it, as the side that is named by
    ``torch.arange`` says. The order of the copies is undefined: no target may be another copy's
    source. Pinned host memory may be either side.

    Args:
        source: shape (num_rows, ...), rows contiguous and of a multiple of 4 bytes; of multiples
            of 64 they move 16 bytes at a time.
        source_ids: int64, shape (C,), where the kernel runs.
        target: as ``source``, with rows of the same size.
        target_ids: int64, shape (C,), none twice.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if source_ids.shape != target_ids.shape:
        raise ValueError(f"{source_ids.shape[0]} sources for {target_ids.shape[0]} targets")
    source_words, target_words = _as_words(source), _as_words(target)
    num_words = source_words.shape[1]
    if num_words != target_words.shape[1]:
        raise ValueError(
            f"rows of {num_words * 4} bytes do not fit rows of {target_words.shape[1] * 4}"
        )
    if not source_ids.shape[0] or not num_words:
        return
    kernel.move_rows[source_ids.shape[0], -(-num_words // kernel.SLICE_WORDS)](
        source_words,
        source_ids,
        target_words,
        target_ids,
        source_words.stride(0),
        target_words.stride(0),
        num_words,
        SLICE_WORDS=kernel.SLICE_WORDS,
        num_warps=kernel.NUM_WARPS,
    )


def copy_rows(rows: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy rows inside one memory; every source is read before any target is written.

    One launch, unless a target is also a source: then what would be overwritten before its turn is
    put aside first.

    Args:
        rows: shape (num_rows, ...), see ``move_rows``.
        sources: int64, shape (C,), on the CPU: the plan needs no word from the device.
        targets: int64, shape (C,), on the CPU, none twice.
    """
    device = rows.device
    is_overwritten = torch.isin(sources, targets)
    if not bool(is_overwritten.any()):
        move_rows(rows, sources.to(device), rows, targets.to(device))
        return
    early = sources[is_overwritten].to(device)
    aside = torch.empty(early.shape[0], *rows.shape[1:], dtype=rows.dtype, device=device)
    places = torch.arange(early.shape[0], device=device)
    move_rows(rows, early, aside, places)
    move_rows(rows, sources[~is_overwritten].to(device), rows, targets[~is_overwritten].to(device))
    move_rows(aside, places, rows, targets[is_overwritten].to(device))


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as int32, shape (num_rows, words of a row)."""
    if rows.shape[0] and not rows[0].is_contiguous():
        raise ValueError(f"rows with strides {tuple(rows.stride())} are not contiguous")
    as_bytes = rows.view(torch.uint8).flatten(1) if rows.dim() > 1 else rows.view(torch.uint8)
    if as_bytes.dim() != 2 or as_bytes.shape[1] % 4 or as_bytes.stride(0) % 4:
        raise ValueError(f"rows of shape {tuple(rows.shape)} are no multiple of 4 bytes")
    return as_bytes.view(_WORD)
