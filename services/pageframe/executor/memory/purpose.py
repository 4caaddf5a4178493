"""For whom and why blocks change hands: what a trace record and an owner entry must name."""

from typing import NamedTuple

from pageframe.core.trace import KvCause


class Purpose(NamedTuple):
    """The cause of an operation and the sequence it serves.

    Attributes:
        cause: Why.
        sequence_id: For whom; 0 for nobody.
        generation: Of the sequence when the operation happened.
        position: First position of the prefill chunk, or the decoded position; for blocks given
            up, the number of tokens that the sequence had computed.
        tenant_id: Who is charged for what is held, as ``block_columns.Tenants`` counts them.
    """

    cause: KvCause
    sequence_id: int = 0
    generation: int = 0
    position: int = 0
    tenant_id: int = 0
