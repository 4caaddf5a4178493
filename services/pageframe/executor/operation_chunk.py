"""A few hundred operations on blocks as arrays, and how to read them again."""

import struct
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause, KvOperation
from pageframe.wire.memory_facts import OperationRecord

NUM_WORDS: Final = 6
"""Numbers of each operation: operation, cause, sequence, step, how many blocks and targets."""

_OPERATIONS: Final = {int(operation): operation for operation in KvOperation}
_CAUSES: Final = {int(cause): cause for cause in KvCause}
# Their targets are slots of the host tier, and the sources of their inverses are.
_TO_HOST: Final = (int(KvOperation.DEMOTE), int(KvOperation.SWAP_OUT))
_FROM_HOST: Final = (int(KvOperation.PROMOTE), int(KvOperation.SWAP_IN))


class LastOperation(NamedTuple):
    """The last operation on a block; ``time_ns`` is exact to within a step."""

    number: int
    operation: KvOperation
    cause: KvCause
    sequence_id: int
    step: int
    time_ns: int


class OperationChunk(NamedTuple):
    """Operations in order, as arrays.

    Attributes:
        first_number: Number of the first of them.
        words: uint64 [n, 6]; of each its operation, cause, sequence, step, number of blocks and
            number of targets.
        ends: uint64 [n], where the ids of each end in ``ids``.
        ids: uint32, blocks and then targets of the first, of the second, and so on.
        times_ns: int64 [n], when each happened, to within a step.
    """

    first_number: int
    words: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    ids: NDArray[np.uint32]
    times_ns: NDArray[np.int64]

    def records(self, start: int, num_max: int, num_ids_max: int) -> list[OperationRecord]:
        """Operations from index ``start``: at least one, then as many as both bounds allow."""
        id_start = int(self.ends[start - 1]) if start else 0
        num_fit = int(np.searchsorted(self.ends, id_start + num_ids_max, side="right")) - start
        stop = start + max(1, min(num_max, num_fit))
        ids: list[int] = self.ids[id_start : int(self.ends[stop - 1])].tolist()
        records, position = [], 0
        number = self.first_number + start
        for operation, cause, sequence_id, step, num_blocks, num_targets in self.words[
            start:stop
        ].tolist():
            middle = position + num_blocks
            end = middle + num_targets
            records.append(
                OperationRecord(
                    number,
                    _OPERATIONS[operation],
                    _CAUSES[cause],
                    sequence_id,
                    step,
                    ids[position:middle],
                    ids[middle:end],
                )
            )
            position = end
            number += 1
        return records

    def touches(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Every block that was touched, and the index of the operation that did, in order."""
        num_targets = self.words[:, 5]
        lengths = self.words[:, 4] + num_targets
        indices = np.repeat(np.arange(len(lengths)), lengths.astype(np.int64))
        if not num_targets.any():
            return self.ids, indices
        operations = self.words[:, :1]
        # [n, 2]: whether the first ids of an operation are blocks, and whether its targets are.
        are_blocks = np.hstack([operations != _FROM_HOST[0], operations != _TO_HOST[0]])
        are_blocks &= np.hstack([operations != _FROM_HOST[1], operations != _TO_HOST[1]])
        is_block = np.repeat(are_blocks.ravel(), self.words[:, 4:].ravel().astype(np.int64))
        return self.ids[is_block], indices[is_block]

    def operation_at(self, index: int) -> LastOperation:
        """One operation, with its time and without its blocks."""
        number = self.first_number + index
        return last_operation(number, int(self.times_ns[index]), self.words[index].tolist())


def last_operation(number: int, time_ns: int, words: list[int]) -> LastOperation:
    """An operation from its number, its time and its words."""
    operation, cause, sequence_id, step = words[:4]
    return LastOperation(number, _OPERATIONS[operation], _CAUSES[cause], sequence_id, step, time_ns)


def pack_chunk(
    first_number: int, words: list[int], ids: list[int], times_ns: NDArray[np.int64]
) -> OperationChunk:
    """A chunk of ``NUM_WORDS`` words and one time for each operation, and the ids of all."""
    # `struct` is four times as fast over a list as `np.array`.
    packed_words = struct.pack(f"={len(words)}Q", *words)
    packed_ids = struct.pack(f"={len(ids)}I", *ids)
    columns = np.frombuffer(packed_words, dtype=np.uint64).reshape(-1, NUM_WORDS)
    return OperationChunk(
        first_number=first_number,
        words=columns,
        ends=(columns[:, 4] + columns[:, 5]).cumsum(),
        ids=np.frombuffer(packed_ids, dtype=np.uint32),
        times_ns=times_ns,
    )
