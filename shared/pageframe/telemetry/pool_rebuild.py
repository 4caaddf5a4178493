"""Rebuilds a block pool from its exported spans alone: the test of a trace's completeness.

Each ``kv.*`` span is one operation with a running number. What each does to a block is written
here once more, from the contract and not from the pool's code, so a fault in either shows as a
difference between what is rebuilt and what the pool says of itself:

    resize            blocks come into being (target) or leave (block ids)
    allocate          free      ─▶ held, 1 reference
    share, pin        held or cached ─▶ held, 1 more; a pin is counted as such too
    release, unpin    1 reference less; the last one: cached if indexed, else fenced
    index, unindex    held: can be found by its prefix, or not any more
    evict             cached    ─▶ fenced, not indexed
    free              fenced    ─▶ free
    move              all that is known of the source is true of the target, the source is free
    quarantine        out of use

``copy_on_write``, ``demote``, ``promote``, ``swap_out`` and ``swap_in`` move content only;
references that change with them have spans of their own. ``fence_clear`` ends a wait.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pageframe.core.errors import InvalidRequestError
from pageframe.core.trace import CONTENT_OPERATIONS, KvOperation
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span

_BY_NAME = {operation.span_name: operation for operation in KvOperation}


@dataclass(slots=True)
class RebuiltBlock:
    """One block, as the trace tells of it; states are named as in ``kv_block.proto``."""

    state: str = "free"
    num_references: int = 0
    num_pins: int = 0
    is_indexed: bool = False


class RebuiltPool:
    """A pool brought to life by spans.

    Attributes:
        blocks: By id.
        num_free: Free blocks.
        last_number: Number of the newest operation taken in; 0 for none.
        faults: Operations that do not follow from those before, one sentence each.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, RebuiltBlock] = {}
        self.last_number = 0
        self.num_free = 0
        self.faults: list[str] = []

    @classmethod
    def of(cls, spans: Iterable[Span], *, up_to: int | None = None) -> "RebuiltPool":
        """Replay all KV operations among ``spans`` in the order of their numbers.

        Args:
            spans: Of one pool incarnation; others than ``kv.*`` are passed over.
            up_to: Number of the last operation to replay; None for all.

        Raises:
            InvalidRequestError: TRACE_OF_SEVERAL_POOLS.
        """
        found = [span for span in spans if span.name in _BY_NAME]
        incarnations = {span.attributes.get(names.KV_POOL_INCARNATION) for span in found}
        if len(incarnations) > 1:
            raise InvalidRequestError(
                "TRACE_OF_SEVERAL_POOLS",
                f"the trace tells of {len(incarnations)} pool incarnations",
                num_pools=len(incarnations),
            )
        pool = cls()
        for span in sorted(found, key=lambda span: int(span.attributes[names.KV_OPERATION])):
            if up_to is None or span.attributes[names.KV_OPERATION] <= up_to:
                pool.take_in(span)
        return pool

    def take_in(self, span: Span) -> None:
        """Replay the next operation."""
        attributes = span.attributes
        number = int(attributes[names.KV_OPERATION])
        if number != self.last_number + 1:
            self.faults.append(f"operation {number} follows {self.last_number}")
        self.last_number = number
        operation = _BY_NAME[span.name]
        if operation in CONTENT_OPERATIONS:
            return
        sources = attributes.get(names.KV_BLOCK_IDS_SOURCE, ())
        targets = attributes.get(names.KV_BLOCK_IDS_TARGET, ())
        block_ids = attributes.get(names.KV_BLOCK_IDS, sources)
        try:
            self._replay(operation, block_ids, targets)
        except (KeyError, _UnlawfulError) as error:
            self.faults.append(f"operation {number}, {span.name}: {error}")
        told = attributes.get(names.KV_BLOCKS_FREE_AFTER)
        # A resize may come in several parts, which all tell what was free after the last.
        if told != self.num_free and operation is not KvOperation.RESIZE:
            self.faults.append(f"operation {number} tells of {told} free blocks of {self.num_free}")

    def _replay(
        self, operation: KvOperation, block_ids: Sequence[int], targets: Sequence[int]
    ) -> None:
        if operation is KvOperation.RESIZE:
            for block_id in targets:
                _expect(block_id not in self.blocks, f"block {block_id} is there already")
                self.blocks[block_id] = RebuiltBlock()
                self.num_free += 1
            for block_id in block_ids:
                state = self.blocks.pop(block_id).state
                self.num_free -= state == "free"
                _expect(state in ("free", "quarantined"), f"block {block_id} was {state}")
            return
        if operation is KvOperation.MOVE:
            for source, target in zip(block_ids, targets, strict=True):
                _expect(self.blocks[target].state == "free", f"block {target} is not free")
                self.blocks[target] = self.blocks[source]
                self.blocks[source] = RebuiltBlock()
            return
        for block_id in block_ids:
            self._change(operation, self.blocks[block_id])

    def _set_state(self, block: RebuiltBlock, state: str) -> None:
        self.num_free += (state == "free") - (block.state == "free")
        block.state = state

    def _change(self, operation: KvOperation, block: RebuiltBlock) -> None:
        """Replay an operation that changes each of its blocks alike."""
        lawful_states, counts = _LAW[operation]
        _expect(block.state in lawful_states, f"a block is {block.state}")
        match operation:
            case KvOperation.ALLOCATE | KvOperation.SHARE | KvOperation.PIN:
                self._set_state(block, "held")
            case KvOperation.FREE:
                self._set_state(block, "free")
            case KvOperation.QUARANTINE:
                self._set_state(block, "quarantined")
                block.num_references = block.num_pins = 0
                block.is_indexed = False
            case KvOperation.INDEX | KvOperation.UNINDEX:
                block.is_indexed = operation is KvOperation.INDEX
            case KvOperation.EVICT:
                self._set_state(block, "fenced")
                block.is_indexed = False
        block.num_references += counts.references
        block.num_pins += counts.pins
        _expect(block.num_references >= 0 and block.num_pins >= 0, "a reference less than none")
        if counts.references < 0 and not block.num_references:
            self._set_state(block, "cached" if block.is_indexed else "fenced")


class _UnlawfulError(Exception):
    """An operation that the state of its blocks does not allow."""


class _Counts(NamedTuple):
    """What an operation adds to references and pins."""

    references: int = 0
    pins: int = 0


_HELD, _TAKEABLE = frozenset({"held"}), frozenset({"held", "cached"})
_ANY = frozenset({"free", "held", "cached", "fenced", "quarantined"})

_LAW: Mapping[KvOperation, tuple[frozenset[str], _Counts]] = {
    KvOperation.ALLOCATE: (frozenset({"free"}), _Counts(references=1)),
    KvOperation.SHARE: (_TAKEABLE, _Counts(references=1)),
    KvOperation.PIN: (_TAKEABLE, _Counts(references=1, pins=1)),
    KvOperation.RELEASE: (_HELD, _Counts(references=-1)),
    KvOperation.UNPIN: (_HELD, _Counts(references=-1, pins=-1)),
    KvOperation.INDEX: (_HELD, _Counts()),
    KvOperation.UNINDEX: (_HELD, _Counts()),
    KvOperation.EVICT: (frozenset({"cached"}), _Counts()),
    KvOperation.FREE: (frozenset({"fenced"}), _Counts()),
    KvOperation.QUARANTINE: (_ANY, _Counts()),
}
"""In which state a block has to be for an operation, and what it adds to its counts."""


def _expect(is_lawful: bool, fault: str) -> None:
    if not is_lawful:
        raise _UnlawfulError(fault)
