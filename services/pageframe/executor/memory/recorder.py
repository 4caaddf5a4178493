"""Records operations on blocks, each with the step it happened in and what was free after it."""

from collections.abc import Callable, Sequence

from pageframe.core.trace import KvOperation, TraceSink
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
