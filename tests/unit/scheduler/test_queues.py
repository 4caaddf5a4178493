import random

import pytest

from pageframe.core.errors import ResourceExhaustedError
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.queues import (
    Backlog,
    Deadlines,
    SequenceQueue,
    TenantQueues,
    by_arrival,
)
from pageframe.scheduler.request import Request
from unit.scheduler.driver import make_submission
from unit.scheduler.test_sequence import make_sequence


def make_request(serial: int, deadline_ns: int = 0) -> Request:
    request = Request(
        serial=serial,
        submission=make_submission(serial, deadline_ns=deadline_ns),
        gateway_id=1,
        outbox=Outbox(1),
    )
    request.num_living = 1
    return request


def test_a_queue_keeps_priority_then_arrival_whatever_comes_and_goes():
    print("seed=7")
    rng = random.Random(7)
    queue = TenantQueues(by_arrival)
    inside = []
    for sequence_id in range(1, 400):
        sequence = make_sequence(
            sequence_id=sequence_id, priority=rng.choice([-1, 0, 0, 5]), tenant=rng.choice("abc")
        )
        queue.add(sequence)
        inside.append(sequence)
        if rng.random() < 0.6:
            gone = inside.pop(rng.randrange(len(inside)))
            queue.remove(gone)
            assert gone not in queue
        inside.sort(key=lambda s: (-s.submission.priority, s.sequence_id))
        assert list(queue) == inside
        assert len(queue) == len(inside)
        assert list(queue.first_few(3)) == inside[:3]


def test_a_walk_goes_on_whatever_is_taken_out_under_its_feet_and_passes_tenants():
    print("seed=8")
    rng = random.Random(8)
    for _ in range(50):
        queue = TenantQueues(by_arrival)
        inside = [
            make_sequence(
                sequence_id=sequence_id, priority=rng.choice([0, 0, 1]), tenant=rng.choice("abc")
            )
            for sequence_id in range(1, 20)
        ]
        for sequence in inside:
            queue.add(sequence)
        inside.sort(key=lambda s: (-s.submission.priority, s.sequence_id))
        walk, passed = queue.walk(), set()
        for expected in inside:
            if expected.submission.tenant in passed:
                continue
            assert walk.current is expected
            act = rng.random()
            if act < 0.1:
                passed.add(expected.submission.tenant)
                walk.pass_tenant()
            elif act < 0.5:
                queue.remove(expected)
                walk.go_on(is_taken=True)
            else:
                walk.go_on(is_taken=False)
        assert walk.current is None


def test_a_sequence_is_in_a_queue_once():
    queue = SequenceQueue(by_arrival)
    sequence = make_sequence()
    queue.add(sequence)
    with pytest.raises(AssertionError, match="is in the queue already"):
        queue.add(sequence)


def test_the_backlog_counts_requests_not_samples_and_tokens_of_all_samples():
    backlog = Backlog(num_requests_max=2, num_tokens_max=50)
    request = make_request(1)
    first, second = make_sequence(10, 1), make_sequence(10, 2)
    backlog.enter(request, first)
    backlog.enter(request, second)
    assert (backlog.num_requests, backlog.num_tokens) == (1, 20)
    backlog.leave(request, first)
    assert (backlog.num_requests, backlog.num_tokens) == (1, 10)
    backlog.leave(request, second)
    assert (backlog.num_requests, backlog.num_tokens) == (0, 0)


def test_a_full_backlog_names_the_bound():
    backlog = Backlog(num_requests_max=1, num_tokens_max=15)
    with pytest.raises(ResourceExhaustedError) as refused:
        backlog.check_room(16)
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.limits == {
        "bound": "tokens",
        "num_queued_tokens": "0",
        "num_request_tokens": "16",
        "num_queued_tokens_max": "15",
    }
    backlog.check_room(15)
    backlog.enter(make_request(1), make_sequence(10))
    with pytest.raises(ResourceExhaustedError) as refused:
        backlog.check_room(1)
    assert refused.value.limits["bound"] == "requests"
    assert refused.value.limits["num_queued_requests_max"] == "1"


def test_deadlines_come_in_order_and_requests_without_one_never():
    deadlines = Deadlines()
    late, early, none = make_request(1, 300), make_request(2, 100), make_request(3)
    for request in (late, early, none):
        deadlines.add(request)
    assert deadlines.next_ns == 100
    assert deadlines.pop_expired(99) == []
    assert deadlines.pop_expired(300) == [early, late]
    assert deadlines.next_ns == 0


def test_requests_that_are_over_are_dropped_from_the_heap():
    deadlines = Deadlines()
    requests = [make_request(serial, 1000 + serial) for serial in range(100)]
    for request in requests:
        deadlines.add(request)
    for request in requests[:90]:
        request.num_living = 0
        deadlines.forget(request)
    assert len(deadlines) == 10
    assert len(deadlines._heap) <= 20
    assert deadlines.next_ns == 1090
    assert deadlines.pop_expired(5000) == requests[90:]
