"""Drawing a trace: which spans share a row, and what stands beside the bars."""

from xml.etree import ElementTree

from bench.reading_traces.waterfall import Panel, draw, rows_of
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span

MS = 1_000_000
TRACE_ID, OTHER = bytes(16), bytes(range(16))


def span(name, span_id, parent, start_ms, end_ms, trace_id=TRACE_ID, links=(), **attributes):
    return Span(
        service=names.SERVICE_SCHEDULER,
        trace_id=trace_id,
        span_id=span_id,
        parent_span_id=parent,
        name=name,
        start_ns=start_ms * MS,
        end_ns=end_ms * MS,
        attributes=attributes,
        links=links,
    )


def tokens(begin, end):
    return {names.TOKENS_BEGIN: begin, names.TOKENS_END: end}


SPANS = [
    span(names.SEQUENCE, 1, 0, 0, 100, **{names.REQUEST_ID: "bob"}),
    span(names.STALL, 2, 1, 0, 40, links=((OTHER, 9),), **{names.STALL_CAUSE: "kv_full"}),
    *(span(names.PREFILL, 10 + n, 1, 40 + n, 41 + n, **tokens(n, n + 1)) for n in range(6)),
    *(span("kv.allocate", 20 + n, 10 + n, 40 + n, 40 + n) for n in range(6)),
    span("kv.index", 30, 1, 50, 50),
    span("kv.index", 31, 1, 60, 60),
    span("kv.free", 32, 1, 99, 99),
]


def test_operations_of_a_kind_share_a_row_and_so_do_many_chunks():
    rows = [(row.depth, row.label) for row in rows_of(SPANS)]
    assert rows == [
        (0, "sequence"),
        (1, "stall"),
        (1, "prefill ×6"),
        (2, "kv.allocate ×6"),
        (1, "kv.index ×2"),
        (1, "kv.free"),
    ]


def test_a_few_chunks_have_rows_of_their_own():
    few = [entry for entry in SPANS if entry.span_id not in (14, 15, 24, 25)]
    labels = [row.label for row in rows_of(few)]
    assert labels.count("prefill") == labels.count("kv.allocate") == 4


def test_waits_never_share_a_row():
    stalls = [span(names.STALL, 2 + n, 1, n, n + 1, **{names.STALL_CAUSE: "x"}) for n in range(9)]
    assert [row.label for row in rows_of([SPANS[0], *stalls])] == ["sequence", *["stall"] * 9]


def test_a_span_without_its_parent_is_drawn_all_the_same():
    assert [row.label for row in rows_of([span("kv.free", 5, 77, 1, 1)])] == ["kv.free"]


def test_a_link_is_told_by_the_name_of_the_request_that_it_leads_to():
    other = [span(names.SEQUENCE, 9, 0, 0, 40, trace_id=OTHER, **{names.REQUEST_ID: "<alice>"})]
    picture = draw("Why & how", [Panel("bob", SPANS), Panel("alice", other)], [SPANS[1]])
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "kv_full → <alice>" in texts
    assert "tokens [0, 6)" in texts
    assert "40.0 ms" in texts


def test_bars_stand_where_their_time_was():
    root = ElementTree.fromstring(draw("t", [Panel("p", SPANS)], [SPANS[1]]))
    (bar,) = [
        element
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if element.get("fill") == "#c8342f"
        and element.get("height") == "12.0"
        and float(element.get("width", 0)) > 12
    ]
    (whole,) = [
        element
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if element.get("fill") == "#e0a13c" and float(element.get("width", 0)) > 500
    ]
    assert bar.get("x") == whole.get("x"), "both begin at 0"
    share = float(bar.get("width", 0)) / float(whole.get("width", 1))
    assert abs(share - 0.4) < 0.001, "40 of 100 ms"
