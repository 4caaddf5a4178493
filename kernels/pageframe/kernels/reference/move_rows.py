"""Reference of ``ops.move_rows``: one row at a time."""

import torch


def move_rows(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    """Copy rows; arguments as in ``ops.move_rows``."""
    for source_id, target_id in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
        target[target_id] = source[source_id]
