"""Long traces in parts: where spans go, how parts are joined, and how they are put back."""

import random
from collections import Counter

import pytest

from pageframe.core.trace import KvCause, KvOperation, SpanKind, TraceMode, child_span_id
from pageframe.telemetry import spans as names
from pageframe.telemetry import trace_parts
from pageframe.telemetry.batch_encoder import BatchEncoder
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.reader import join_parts
from pageframe.telemetry.ring import RingReader, RingWriter
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.trace_parts import PartKind, Room, TraceParts
from unit.telemetry.records_of import make_batch, read_packed
from unit.telemetry.spans_of_request import spans_in

TRACE_ID, OTHER_TRACE_ID = bytes(range(16)), bytes(range(1, 17))
SEQUENCE_SPAN = 0x0102030405060708
MANY = 30_000


class House:
    """A sink over a ring, and what an exporter makes of it."""

    def __init__(self, folder) -> None:
        ring = RingWriter(
            folder / "ring",
            service_name="s",
            mode=TraceMode.ALL,
            incarnation=1,
            capacity_bytes=16 << 20,
        )
        self.sink = RingTraceSink(ring, mode=TraceMode.ALL)
        self._reader = RingReader(folder / "ring")
        self._encoder = BatchEncoder(JsonForm())

    def begin(self, sequence_id: int, trace_id: bytes = TRACE_ID) -> None:
        span_id = (SEQUENCE_SPAN + sequence_id).to_bytes(8, "big")
        self.sink.sequence_begin(
            sequence_id, trace_id=trace_id, span_id=span_id, request_id="r", tenant="acme"
        )

    def allocate(self, sequence_id: int, position: int) -> None:
        self.sink.kv(
            KvOperation.ALLOCATE,
            KvCause.DECODE,
            sequence_id=sequence_id,
            generation=0,
            position=position,
            step=1,
            block_ids=[position],
            num_free_after=0,
        )

    def span(self, name: str, number: int, links=()) -> None:
        self.sink.span(
            name,
            trace_id=TRACE_ID,
            span_id=1 + number,
            parent_span_id=SEQUENCE_SPAN,
            start_ns=1,
            end_ns=2,
            attributes={},
            links=links,
        )

    def spans(self):
        batch = make_batch(*read_packed(self._reader))
        return [span for line, _ in self._encoder.requests(batch) for span in spans_in(line)]


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture(scope="module")
def long_request(tmp_path_factory):
    """The spans of one sequence with very many operations."""
    house = House(tmp_path_factory.mktemp("ring"))
    house.begin(7)
    for position in range(MANY):
        house.allocate(7, position)
    return house.spans()


def sizes(spans) -> Counter:
    return Counter(span.trace_id for span in spans)


def test_thirty_thousand_operations_are_four_traces_none_too_long(long_request):
    spans = long_request
    assert list(sizes(spans).values()) == [2_401, 10_000, 10_000, 7_605]
    operations = [span.attributes["kv.operation"] for span in spans if span.name == "kv.allocate"]
    assert operations == list(range(1, MANY + 1))


def test_parts_are_linked_both_ways_and_nothing_hangs_in_the_air(long_request):
    spans = long_request
    roots = [span for span in spans if span.name == names.CONTINUATION]
    ends = [span for span in spans if span.name == names.CONTINUED]
    assert [root.attributes[names.TRACE_PART] for root in roots] == [1, 2, 3]
    assert all(root.attributes[names.TRACE_CONTINUES] == TRACE_ID.hex() for root in roots)
    assert [end.links for end in ends] == [((root.trace_id, root.span_id),) for root in roots]
    sequence = (TRACE_ID, SEQUENCE_SPAN + 7)
    before = [sequence, *((root.trace_id, root.span_id) for root in roots[:2])]
    assert [root.links for root in roots] == [(link,) for link in before]
    assert [(end.trace_id, end.parent_span_id) for end in ends] == before
    for root in roots:
        inside = [span for span in spans if span.trace_id == root.trace_id and span is not root]
        assert {span.parent_span_id for span in inside} == {root.span_id}


def test_what_was_moved_is_put_back_where_it_would_have_been(long_request):
    joined = join_parts(long_request)
    assert {span.name for span in joined} == {"kv.allocate"}
    assert [(span.trace_id, span.parent_span_id, span.links) for span in joined] == [
        (TRACE_ID, child_span_id(SEQUENCE_SPAN + 7, SpanKind.DECODE, 0, position // 128), ())
        for position in range(MANY)
    ]


def test_samples_of_a_request_share_its_room_and_another_request_has_its_own(house):
    print("seed", 3)
    dice = random.Random(3)
    for sequence_id in range(1, 5):
        house.begin(sequence_id)
    house.begin(9, OTHER_TRACE_ID)
    for position in range(13_000):
        house.allocate(dice.randint(1, 4), position)
    house.allocate(9, 1)
    spans = house.spans()
    by_trace = sizes(spans)
    assert max(by_trace.values()) <= 10_000
    assert by_trace[OTHER_TRACE_ID] == 1
    assert list(by_trace.values())[:2] == [2_401, 10_000]
    assert len([span for span in spans if span.name == names.CONTINUATION]) == 2


def test_every_kind_has_its_own_room_and_together_they_fit(house):
    house.begin(7)
    house.span(names.GENERATE, 0)
    for number in range(1, 6_001):
        house.span(names.DECODE if number % 2 else names.PREFILL, number)
        house.span(names.STALL, MANY + number, links=[(OTHER_TRACE_ID, 5)])
        house.allocate(7, number)
    house.span(names.SEQUENCE, 2 * MANY)
    spans = house.spans()
    by_trace = sizes(spans)
    # Beside the spans of all kinds: generate, sequence, and where each kind goes on.
    assert by_trace.pop(TRACE_ID) == 2_400 + 4_900 + 2_400 + 2 + 3
    assert sorted(by_trace.values()) == [1_101, 3_601, 3_601]
    stalls = [span for span in join_parts(spans) if span.name == names.STALL]
    assert len(stalls) == 6_000
    assert {span.links for span in stalls} == {((OTHER_TRACE_ID, 5),)}
    assert {(span.trace_id, span.parent_span_id) for span in stalls} == {(TRACE_ID, SEQUENCE_SPAN)}


def test_operations_leave_before_what_they_hang_under():
    first = trace_parts.NUM_SPANS_IN_FIRST_PART
    assert 2 * first[PartKind.OPERATIONS] <= first[PartKind.COMPUTING]
    assert sum(first.values()) + len(PartKind) <= trace_parts.NUM_SPANS_PER_TRACE_MAX - 200


def test_what_serves_no_traced_request_never_moves(house):
    house.sink.sequence_begin(7, trace_id=b"", span_id=b"", request_id="r", tenant="")
    for position in range(3_000):
        house.allocate(7, position)
        house.allocate(0, position)
    assert {span.name for span in house.spans()} == {"pool", "kv.allocate"}


def test_only_so_many_traces_are_remembered(monkeypatch):
    monkeypatch.setattr(trace_parts, "NUM_TRACES_REMEMBERED_MAX", 3)
    parts = TraceParts()
    rooms = [parts.room(bytes([1 + number] * 16), PartKind.WAITING) for number in range(4)]
    assert parts.room(rooms[1].trace_id, PartKind.WAITING) is rooms[1]
    assert parts.room(rooms[0].trace_id, PartKind.WAITING) is not rooms[0], "the oldest is gone"


def test_the_last_part_that_can_be_named_takes_the_rest():
    parts = TraceParts()
    full = Room(TRACE_ID, PartKind.OPERATIONS, trace_parts.NUM_PARTS_MAX, 0)
    full.num_left -= 1
    room, is_new = parts.after(full)
    assert (room, is_new) == (full, False)
    assert room.num_left > 1 << 60
