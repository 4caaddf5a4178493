"""The memory's own account of what it did, operation by operation, as a trace reader gets it."""

from collections.abc import Sequence
from typing import NamedTuple

from pageframe.core.trace import KvCause, KvOperation, NullTraceSink


class Record(NamedTuple):
    """One operation; see ``core.trace.TraceSink.kv``."""

    operation: KvOperation
    cause: KvCause
    sequence_id: int
    block_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    num_free_after: int


class RecordSink(NullTraceSink):
    """Keeps records until they are taken."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def kv(
        self,
        operation: KvOperation,
        cause: KvCause,
        *,
        sequence_id: int,
        generation: int,
        position: int,
        step: int,
        block_ids: Sequence[int],
        target_ids: Sequence[int] = (),
        num_free_after: int,
    ) -> None:
        """Keep one operation."""
        self._records.append(
            Record(
                operation, cause, sequence_id, tuple(block_ids), tuple(target_ids), num_free_after
            )
        )

    def take(self) -> list[Record]:
        """What came since the last call."""
        records, self._records = self._records, []
        return records
