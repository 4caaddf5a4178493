"""Records operations on blocks, each with the step it happened in and what was free after it."""

from collections.abc import Callable, Iterable, Sequence

from pageframe.core.trace import KvCause, KvOperation, TraceSink
from pageframe.executor.memory.purpose import Purpose


class OperationRecorder:
    """Hands operations to the trace sink, in the order in which they happen.

    Attributes:
        step: Step that operations are recorded under; 0 outside any step.
        num_free: Says how many blocks are free now.
    """

    def __init__(self, trace: TraceSink, num_free: Callable[[], int]) -> None:
        self.step = 0
        self.num_free = num_free
        self._trace = trace

    def record(
        self,
        operation: KvOperation,
        purpose: Purpose,
        block_ids: Sequence[int],
        target_ids: Sequence[int] = (),
    ) -> None:
        """Record one operation; see ``TraceSink.kv``."""
        self._trace.kv(
            operation,
            purpose.cause,
            sequence_id=purpose.sequence_id,
            generation=purpose.generation,
            position=purpose.position,
            step=self.step,
            block_ids=block_ids,
            target_ids=target_ids,
            num_free_after=self.num_free(),
        )

    def record_allocated_each(
        self,
        cause: KvCause,
        rows: Iterable[tuple[int, int, int]],
        block_ids: Sequence[int],
    ) -> None:
        """Record that each of n sequences has got one of n blocks, one record each.

        ``rows`` are sequence id, generation and position of each.
        """
        # What the loop needs is looked up once: it runs for every block of a decode step.
        kv, step, allocated = self._trace.kv, self.step, KvOperation.ALLOCATE
        num_free_after = self.num_free() + len(block_ids)
        for (sequence_id, generation, position), block_id in zip(rows, block_ids, strict=True):
            num_free_after -= 1
            kv(
                allocated,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=(block_id,),
                num_free_after=num_free_after,
            )

    def record_indexed_each(
        self, cause: KvCause, rows: Iterable[tuple[int, int, int, Sequence[int]]]
    ) -> None:
        """Record that blocks of each of n sequences were entered into the prefix index.

        ``rows`` are sequence id, generation, position and blocks of each; one record each.
        """
        kv, step, indexed, num_free = self._trace.kv, self.step, KvOperation.INDEX, self.num_free()
        for sequence_id, generation, position, block_ids in rows:
            kv(
                indexed,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=block_ids,
                num_free_after=num_free,
            )

    def record_copied_each(
        self,
        cause: KvCause,
        rows: Iterable[tuple[int, int, int]],
        sources: Sequence[int],
        targets: Sequence[int],
    ) -> None:
        """Record that each of n sequences has got a copy in place of a block, two records each."""
        kv, step, num_free = self._trace.kv, self.step, self.num_free()
        copied, released = KvOperation.COPY_ON_WRITE, KvOperation.RELEASE
        for (sequence_id, generation, position), source, target in zip(
            rows, sources, targets, strict=True
        ):
            block_ids = (source,)
            kv(
                copied,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=block_ids,
                target_ids=(target,),
                num_free_after=num_free,
            )
            kv(
                released,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=block_ids,
                num_free_after=num_free,
            )
