"""Long traces in parts: no trace grows past what a viewer opens, and parts link to one another.

A trace of a request has room for so many spans of each kind. When a kind has used its room up, a
*continuation* begins: a trace of its own, for that kind only, with a root that links back::

    generate                              continuation 1               continuation 2
    └─ sequence ◀──────────── link ──────  (root) ◀───────── link ───── (root)
       ├─ decode ◀─────────── link ──────  ├─ kv.allocate               ├─ …
       │  └─ kv.allocate                   ├─ …
       └─ continued ───────── link ─────▶  └─ continued ──── link ────▶

A span that has moved hangs under its continuation's root. Its last link names the trace and the
parent that it would have had, so a reader can put it back (``reader.join_parts``) and nothing is
lost by the cut. What holds a trace together (``generate``, ``tokenize``, ``sequence``) never moves.

Operations on blocks hang under ``prefill`` and ``decode`` spans of another process, which counts
for itself. Operations have the least room, so they leave first, and an operation that stays finds
its parent in its own trace: even at 256 tokens a block, where there is one of them for every two
decode spans.

The writer decides, not the exporter: the part is in the record, so a record that is read twice goes
to the same place twice. A writer counts for itself; that of a new process starts over.
"""

import enum
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from pageframe.core.trace import AttributeValue
from pageframe.telemetry import spans as names
from pageframe.telemetry.context import TRACE_ID_BYTES
from pageframe.telemetry.span_records import pack_span

NUM_SPANS_PER_TRACE_MAX: Final = 10_000
NUM_TRACES_REMEMBERED_MAX: Final = 4096
# As many parts as a record can name.
NUM_PARTS_MAX: Final = (1 << 16) - 1
_ENDLESS: Final = 1 << 62
_NO_TRACES: Final = frozenset({b"", bytes(TRACE_ID_BYTES)})


@enum.unique
class PartKind(enum.IntEnum):
    """What is counted together, and moves together."""

    OPERATIONS = 1
    COMPUTING = 2
    WAITING = 3


KIND_OF_SPAN: Final[Mapping[str, PartKind]] = {
    names.PREFILL: PartKind.COMPUTING,
    names.DECODE: PartKind.COMPUTING,
    names.STALL: PartKind.WAITING,
    names.PREEMPT: PartKind.WAITING,
}
"""Spans that there may be any number of; those of other names stay where they are."""

NUM_SPANS_IN_FIRST_PART: Final[Mapping[PartKind, int]] = {
    PartKind.OPERATIONS: 2_400,
    PartKind.COMPUTING: 4_900,
    PartKind.WAITING: 2_400,
}
"""Together they leave 300 for ``generate`` and its kind, and for one ``continued`` of each kind."""

# A root and a `continued` come on top.
NUM_SPANS_IN_CONTINUATION: Final = NUM_SPANS_PER_TRACE_MAX - 2


class Room:
    """Room for spans of one kind in one part of a trace.

    All sequences of a request share it. Whoever takes the last place makes ``successor``; others
    find it there.

    Attributes:
        trace_id: Of the request, whatever the part.
        kind: Of the spans.
        part: 0 is the request's own trace.
        num_left: Places left; below 0 when there was none for the last that asked.
        successor: The next part, once there is one.
    """

    __slots__ = ("kind", "num_left", "part", "successor", "trace_id")

    def __init__(self, trace_id: bytes, kind: PartKind, part: int, num_spans: int) -> None:
        self.trace_id = trace_id
        self.kind = kind
        self.part = part
        self.num_left = num_spans
        self.successor: Room | None = None


def part_root(trace_id: bytes, incarnation: int, kind: PartKind, part: int) -> tuple[bytes, int]:
    """Trace (16 bytes) and root span, in ``[1, 2**64)``, of a continuation; ``part`` from 1 on.

    ``incarnation`` is that of the writer: two writers of one trace have continuations of their own.
    """
    origin = trace_id, incarnation, kind, part
    return _digest(16, b"part", *origin), _span_id(b"part root", *origin)


def pack_seam(
    room: Room, incarnation: int, parent_span_id: int, time_ns: int
) -> tuple[bytes, bytes]:
    """Records of the two spans that join a new part to the one before; its own spans follow them.

    Args:
        room: Of the new part.
        incarnation: Of the writer.
        parent_span_id: Under which span, in the request's own trace, that trace is continued.
        time_ns: When.
    """
    trace_id, kind, part = room.trace_id, room.kind, room.part
    before, after = (trace_id, parent_span_id), part_root(trace_id, incarnation, kind, part)
    if part > 1:
        before = part_root(trace_id, incarnation, kind, part - 1)
    attributes: dict[str, AttributeValue] = {
        names.TRACE_CONTINUES: trace_id.hex(),
        names.TRACE_PART: part,
        names.TRACE_PART_KIND: kind.name.lower(),
    }
    continued = pack_span(
        names.CONTINUED,
        trace_id=before[0],
        span_id=_span_id(b"part end", trace_id, incarnation, kind, part),
        parent_span_id=before[1],
        start_ns=time_ns,
        end_ns=time_ns,
        attributes=attributes,
        links=(after,),
        error="",
    )
    continuation = pack_span(
        names.CONTINUATION,
        trace_id=after[0],
        span_id=after[1],
        parent_span_id=0,
        start_ns=time_ns,
        end_ns=time_ns,
        attributes=attributes,
        links=(before,),
        error="",
    )
    return continued, continuation


def _span_id(domain: bytes, trace_id: bytes, *words: int) -> int:
    return int.from_bytes(_digest(8, domain, trace_id, *words), "big") or 1


def _digest(num_bytes: int, domain: bytes, trace_id: bytes, *words: int) -> bytes:
    packed = domain + trace_id + struct.pack(f"<{len(words)}Q", *words)
    return hashlib.blake2b(packed, digest_size=num_bytes).digest()


class TraceParts:
    """Which part of its trace a span goes to, for one writer.

    Remembers as many traces as may run at once, the latest; one that is forgotten starts over.
    """

    def __init__(self) -> None:
        # By kind and trace; an index and a key of bytes, since a member of an enum hashes slowly.
        self._rooms: list[OrderedDict[bytes, Room]] = [
            OrderedDict() for _ in range(max(PartKind) + 1)
        ]
        self.endless = Room(b"", PartKind.OPERATIONS, 0, _ENDLESS)

    def room(self, trace_id: bytes, kind: PartKind) -> Room:
        """Where spans of a kind go now; ``endless`` for what belongs to no request's trace."""
        if trace_id in _NO_TRACES:
            return self.endless
        rooms = self._rooms[kind]
        room = rooms.get(trace_id)
        if room is not None:
            rooms.move_to_end(trace_id)
            return room
        room = Room(trace_id, kind, 0, NUM_SPANS_IN_FIRST_PART[kind])
        self._remember(room)
        return room

    def after(self, room: Room) -> tuple[Room, bool]:
        """A room with a place for one more span, which is taken, and whether it is a new part.

        Args:
            room: Is full: its ``num_left`` is below 0.
        """
        assert room.num_left < 0, f"{room.num_left} places are left"
        while room.num_left < 0 and room.successor is not None:
            room = room.successor
            room.num_left -= 1
        if room.num_left >= 0:
            return room, False
        if room.part == NUM_PARTS_MAX:
            # 650 million spans of one request: from here on the last part only grows.
            room.num_left = _ENDLESS
            return room, False
        room.successor = Room(
            room.trace_id, room.kind, room.part + 1, NUM_SPANS_IN_CONTINUATION - 1
        )
        self._remember(room.successor)
        return room.successor, True

    def _remember(self, room: Room) -> None:
        rooms = self._rooms[room.kind]
        rooms[room.trace_id] = room
        rooms.move_to_end(room.trace_id)
        if len(rooms) > NUM_TRACES_REMEMBERED_MAX:
            rooms.popitem(last=False)
