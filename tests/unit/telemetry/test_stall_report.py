"""Reading back where the time went, from spans made by hand."""

from dataclasses import replace

import pytest

from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span
from pageframe.telemetry.stall_report import stall_report

MS = 1_000_000


def span(name: str, trace: int, span_id: int, start_ms: int, end_ms: int, **fields) -> Span:
    fields.setdefault("attributes", {})
    fields.setdefault("parent_span_id", 0)
    return Span(
        service="",
        name=name,
        trace_id=bytes([trace]) * 16,
        span_id=span_id,
        start_ns=start_ms * MS,
        end_ns=end_ms * MS,
        **fields,
    )


def request(trace: int, name: str, tenant: str, elapsed_ms: float, **stall_ms: float) -> list[Span]:
    """The spans of one request: ``generate`` has the id 1 and ``sequence`` 2."""
    attributes = {
        names.REQUEST_ID: name,
        names.TENANT: tenant,
        names.ELAPSED_MS: elapsed_ms,
        names.COMPUTE_MS: elapsed_ms - sum(stall_ms.values()),
        **{names.STALL_MS.format(cause): waited_ms for cause, waited_ms in stall_ms.items()},
    }
    named = {names.REQUEST_ID: name, names.TENANT: tenant}
    return [
        span(names.GENERATE, trace, 1, 0, int(elapsed_ms), attributes=attributes),
        span(names.SEQUENCE, trace, 2, 0, int(elapsed_ms), parent_span_id=1, attributes=named),
    ]


def stall(trace: int, span_id: int, cause: str, start_ms: int, end_ms: int, culprit: int) -> Span:
    return span(
        names.STALL,
        trace,
        span_id,
        start_ms,
        end_ms,
        parent_span_id=2,
        attributes={names.STALL_CAUSE: cause},
        links=((bytes([culprit]) * 16, 2),),
    )


SPANS = [
    *request(1, "long", "a", 100.0, queue=1.0),
    *request(2, "victim", "a", 80.0, preempted=30.0, queue=9.0),
    *request(3, "other", "b", 60.0, kv_full=20.0, unexplained=0.5),
    stall(2, 3, "preempted", 10, 40, culprit=1),
    stall(3, 3, "kv_full", 0, 20, culprit=1),
]


def test_causes_come_largest_first_with_their_worst_request():
    causes = stall_report(SPANS).by_cause()
    assert list(causes) == ["preempted", "kv_full", "queue", "unexplained"]
    queue = causes["queue"]
    assert (queue.num_requests, queue.total_ms) == (2, 10.0)
    assert (queue.longest_ms, queue.longest_request_id) == (9.0, "victim")


def test_compute_and_waits_are_all_of_a_request():
    for entry in stall_report(SPANS).requests:
        assert entry.compute_ms + entry.waited_ms == pytest.approx(entry.elapsed_ms)


def test_a_culprit_answers_for_all_that_waited_for_its_sake():
    (culprit,) = stall_report(SPANS).culprits
    assert (culprit.request_id, culprit.victims) == ("long", {"victim", "other"})
    assert culprit.stall_ms == {"preempted": 30.0, "kv_full": 20.0}


def test_a_tenant_sees_its_own_waits_and_who_caused_them():
    report = stall_report(SPANS)
    assert report.tenants == ["a", "b"]
    own = report.of_tenant("b")
    assert [entry.request_id for entry in own.requests] == ["other"]
    assert [culprit.request_id for culprit in own.culprits] == ["long"]
    assert report.of_tenant("nobody").requests == []


def test_a_culprit_whose_spans_are_not_here_is_told_without_a_name():
    (culprit,) = stall_report([*request(2, "victim", "a", 80.0), SPANS[-2]]).culprits
    assert (culprit.request_id, culprit.victims) == ("", {"victim"})


def test_what_has_not_ended_is_counted_and_not_judged():
    report = stall_report([entry for entry in SPANS if entry.trace_id[0] != 3] + [SPANS[-1]])
    assert (len(report.requests), report.num_unfinished) == (2, 1)


def test_of_a_culprit_only_what_the_tenant_itself_waited_for_is_told():
    (culprit,) = stall_report(SPANS).of_tenant("b").culprits
    assert (culprit.victims, culprit.stall_ms) == ({"other"}, {"kv_full": 20.0})
    (culprit,) = stall_report(SPANS).of_request("victim").culprits
    assert (culprit.victims, culprit.stall_ms) == ({"victim"}, {"preempted": 30.0})


def test_two_tenants_may_use_the_same_name():
    same = [
        *request(1, "long", "a", 100.0),
        *request(2, "job", "a", 80.0, preempted=30.0),
        *request(3, "job", "b", 60.0, kv_full=20.0),
        *SPANS[-2:],
    ]
    (culprit,) = stall_report(same).of_tenant("b").culprits
    assert culprit.stall_ms == {"kv_full": 20.0}


def test_requests_of_one_callers_trace_are_told_apart():
    first, second = (
        [
            replace(entry, trace_id=b"t" * 16, span_id=entry.span_id + shift)
            for entry in request(1, name, "a", 50.0)
        ]
        for name, shift in (("first", 0), ("second", 10))
    )
    second[1] = replace(second[1], parent_span_id=11)
    waits = [
        replace(stall(2, 3, "kv_full", 0, 20, culprit=0), links=((b"t" * 16, 2),)),
        replace(stall(2, 4, "kv_full", 20, 25, culprit=0), links=((b"t" * 16, 12),)),
    ]
    spans = [*first, *second, *request(2, "victim", "a", 80.0, kv_full=25.0), *waits]
    found = [(entry.request_id, entry.total_ms) for entry in stall_report(spans).culprits]
    assert found == [("first", 20.0), ("second", 5.0)]
