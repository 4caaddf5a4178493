"""A trace sink that takes everything and keeps nothing.

Whoever writes to it behaves as if traced, which ``NullTraceSink`` saves them.
"""

from collections.abc import Mapping, Sequence

from pageframe.core.trace import AttributeValue, KvCause, KvOperation


class QuietTraceSink:
    """Listens and forgets."""

    def sequence_begin(
        self, sequence_id: int, *, trace_id: bytes, span_id: bytes, request_id: str, tenant: str
    ) -> None:
        """Forget it."""

    def sequence_end(self, sequence_id: int) -> None:
        """Forget it."""

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
        """Forget it."""

    def span(
        self,
        name: str,
        *,
        trace_id: bytes,
        span_id: int,
        parent_span_id: int,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue],
        links: Sequence[tuple[bytes, int]] = (),
        error: str = "",
    ) -> None:
        """Forget it."""
