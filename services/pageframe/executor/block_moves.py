"""Whole blocks that a model runner moves between two steps' writes; NumPy arrays, no torch."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageframe.core.errors import InternalError

Int64Array = NDArray[np.int64]

_NO_IDS: Int64Array = np.empty(0, dtype=np.int64)


def _no_ids() -> Int64Array:
    return _NO_IDS


@dataclass(slots=True, kw_only=True)
class BlockMoves:
    """Whole blocks to move before a step's writes, in this order, each as one operation.

        out    device block -> host slot
        copy   device block -> device block; all sources are read before any target is written
        in     host slot    -> device block

    Because of the order, a block that is moved out may be the target of a copy, and one that is
    copied from may be the target of a move in. No operation writes one place twice.

    Attributes:
        out_sources: int64 [O], blocks.
        out_slots: int64 [O], host slots.
        copy_sources: int64 [C], blocks.
        copy_targets: int64 [C], blocks.
        in_slots: int64 [I], host slots.
        in_targets: int64 [I], blocks.
    """

    out_sources: Int64Array = field(default_factory=_no_ids)
    out_slots: Int64Array = field(default_factory=_no_ids)
    copy_sources: Int64Array = field(default_factory=_no_ids)
    copy_targets: Int64Array = field(default_factory=_no_ids)
    in_slots: Int64Array = field(default_factory=_no_ids)
    in_targets: Int64Array = field(default_factory=_no_ids)

    def __len__(self) -> int:
        """Number of moves in all."""
        return len(self.out_slots) + len(self.copy_targets) + len(self.in_targets)

    def check(self, num_blocks: int, num_host_slots: int) -> None:
        """Make sure that every place exists, and that none is written twice by one operation.

        Raises:
            InternalError: reason MOVE_INVALID; nothing has been moved.
        """
        for name, sources, targets, num_sources, num_targets in (
            ("out", self.out_sources, self.out_slots, num_blocks, num_host_slots),
            ("copy", self.copy_sources, self.copy_targets, num_blocks, num_blocks),
            ("in", self.in_slots, self.in_targets, num_host_slots, num_blocks),
        ):
            if len(sources) or len(targets):
                _check_move(name, sources, targets, num_sources, num_targets)


def _check_move(
    name: str, sources: Int64Array, targets: Int64Array, num_sources: int, num_targets: int
) -> None:
    if len(sources) != len(targets):
        why = f"{len(sources)} sources for {len(targets)} targets"
    elif sources.min() < 0 or sources.max() >= num_sources:
        why = f"sources {sources.min()} to {sources.max()}, but there are {num_sources}"
    elif targets.min() < 0 or targets.max() >= num_targets:
        why = f"targets {targets.min()} to {targets.max()}, but there are {num_targets}"
    elif len(set(targets.tolist())) != len(targets):
        why = "a target twice"
    else:
        return
    raise InternalError(
        "MOVE_INVALID",
        f"cannot move blocks ({name}): {why}",
        num_sources=num_sources,
        num_targets=num_targets,
    )
