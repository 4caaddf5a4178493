"""What is traced, in words that all processes share, and the sink that records go into.

Span ids of prefill and decode spans are *computed* from the sequence's own span id, so the
executor can hang ``kv.*`` spans under spans that the scheduler exports, and no id has to cross
the wire for it:

    sequence span id ──child_span_id(PREFILL, generation, first position of the chunk)──▶ prefill
                     ──child_span_id(DECODE, generation, position // 128)───────────────▶ decode

A sink must be cheap (a packed record, no I/O) and must never block under ``all`` and ``sampled``.
"""

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from pageframe.core.limits import LIMITS

AttributeValue = str | int | float | bool | Sequence[int] | Sequence[str]


class NumberColumns:
    """Keys and types of attributes that many spans have alike, all of them numbers.

    Attributes:
        names: Keys.
        types: ``int`` or ``float``, of each.
    """

    __slots__ = ("names", "types")

    def __init__(self, columns: Mapping[str, type[int] | type[float]]) -> None:
        self.names = tuple(columns)
        self.types = tuple(columns.values())


class NumberRow(Mapping[str, int | float]):
    """Attributes of one span: a row of numbers under columns that were named once.

    For spans that every step writes: a sink takes the numbers as they are and asks for no key.

    Attributes:
        columns: Made once, for all spans of a name.
        numbers: One for each column.
    """

    __slots__ = ("columns", "numbers")

    def __init__(self, columns: NumberColumns, *numbers: float) -> None:
        self.columns = columns
        self.numbers = numbers

    def __getitem__(self, key: str) -> int | float:
        try:
            return self.numbers[self.columns.names.index(key)]
        except ValueError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names)

    def __len__(self) -> int:
        return len(self.numbers)


_MASK_64 = (1 << 64) - 1


@enum.unique
class TraceMode(enum.StrEnum):
    """How much is traced: everything and lossless, everything, a share of requests, nothing."""

    AUDIT = "audit"
    ALL = "all"
    SAMPLED = "sampled"
    OFF = "off"


@enum.unique
class KvOperation(enum.IntEnum):
    """What happened to blocks. The span name is ``kv.`` and the lower-case member name."""

    ALLOCATE = 1
    SHARE = 2
    COPY_ON_WRITE = 3
    RELEASE = 4
    FREE = 5
    INDEX = 6
    UNINDEX = 7
    EVICT = 8
    DEMOTE = 9
    PROMOTE = 10
    SWAP_OUT = 11
    SWAP_IN = 12
    PIN = 13
    UNPIN = 14
    MOVE = 15
    FENCE_CLEAR = 16
    QUARANTINE = 17
    RESIZE = 18

    @property
    def span_name(self) -> str:
        """For example ``kv.copy_on_write``."""
        return f"kv.{self.name.lower()}"


CONTENT_OPERATIONS: Final = frozenset(
    {
        KvOperation.COPY_ON_WRITE,
        KvOperation.DEMOTE,
        KvOperation.PROMOTE,
        KvOperation.SWAP_OUT,
        KvOperation.SWAP_IN,
        KvOperation.FENCE_CLEAR,
    }
)
"""Those that change what is in blocks, or say it may change, and nothing of who refers to them."""


@enum.unique
class KvCause(enum.IntEnum):
    """Why it happened; the value of the attribute ``kv.cause`` is the lower-case member name."""

    PREFILL = 1
    DECODE = 2
    FINISHED = 3
    PREEMPTED = 4
    CANCELLED = 5
    STEP_COMPLETED = 6
    TAKEOVER = 7
    INTEGRITY = 8
    OPERATOR = 9
    PREFIX_HIT = 10
    FORK = 11
    SEALED = 12
    POOL_PRESSURE = 13
    SWAP = 14
    TAIL = 15
    WINDOW = 16
    RETAIN = 17
    SESSION = 18
    EXPIRED = 19
    RESIZE = 20
    IMPORT = 21
    DRAFT = 22

    @property
    def is_prefill(self) -> bool:
        """Whether its spans hang under the prefill span that begins at the record's position."""
        return self in (KvCause.PREFILL, KvCause.PREFIX_HIT)


@enum.unique
class SpanKind(enum.IntEnum):
    """Spans whose id is computed by ``child_span_id``."""

    SEQUENCE = 1
    PREFILL = 2
    DECODE = 3


def child_span_id(parent_span_id: int, kind: SpanKind, generation: int, index: int) -> int:
    """A span id in ``[1, 2**64)`` that depends on all arguments and on nothing else.

    ``index`` is the sample index for a sequence, the first position of the chunk for a prefill,
    and ``decode_segment(position)`` for a decode. The mixing is SplitMix64 (Steele et al. 2014).
    """
    mixed = parent_span_id & _MASK_64
    for word in (int(kind), generation, index):
        mixed = (mixed + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
        mixed ^= mixed >> 31
    return mixed or 1


def decode_segment(position: int) -> int:
    """Which decode span a token position falls into; one covers at most 128 positions."""
    return position // LIMITS.num_tokens_per_decode_span_max


class TraceSink(Protocol):
    """Takes records of one process. Implemented by the shared-memory ring and by test doubles."""

    def sequence_begin(
        self, sequence_id: int, *, trace_id: bytes, span_id: bytes, request_id: str, tenant: str
    ) -> None:
        """Give the context that later ``kv`` records of this sequence belong to.

        ``trace_id`` (16 bytes) and ``span_id`` (8 bytes) may be empty: then the sequence is not
        traced and its ``kv`` records go to the pool's own trace.
        """
        ...

    def sequence_end(self, sequence_id: int) -> None:
        """Forget the context; later records of this sequence go to the pool's own trace."""
        ...

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
        """Record one operation on blocks, in the order in which it happened.

        Args:
            operation: What.
            cause: Why; prefill causes and ``DECODE`` hang the span under that span.
            sequence_id: For whom; 0 for nobody.
            generation: Of the sequence.
            position: First position of the prefill chunk, or the decoded token's position.
            step: Step number, 0 outside any step.
            block_ids: Every block touched; for copies and moves the sources.
            target_ids: For copies and moves the targets.
            num_free_after: Free blocks after the operation.
        """
        ...

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
        """Record a finished span. ``error`` sets the error status with that text.

        ``links`` are pairs of trace id and span id, for example of a stall's culprit.
        """
        ...


class QuietTraceSink:
    """Listens and forgets: whoever writes to it behaves as if traced."""

    def sequence_begin(
        self, sequence_id: int, *, trace_id: bytes, span_id: bytes, request_id: str, tenant: str
    ) -> None:
        """Do nothing."""

    def sequence_end(self, sequence_id: int) -> None:
        """Do nothing."""

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
        """Do nothing."""

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
        """Do nothing."""


class NullTraceSink(QuietTraceSink):
    """Drops everything, and says so: writers may spare themselves the work; ``--trace off``."""
