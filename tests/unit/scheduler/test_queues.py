import pytest

from pageframe.core.errors import ResourceExhaustedError
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.queues import Backlog, SequenceQueue, by_place
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


def test_a_sequence_is_in_a_queue_once():
    queue = SequenceQueue(by_place)
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
        backlog.check_room("", 16)
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.limits == {
        "bound": "tokens",
        "num_queued_tokens": "0",
        "num_queued_tokens_of_tenant": "0",
        "num_request_tokens": "16",
        "num_queued_tokens_max": "15",
    }
    backlog.check_room("", 15)
    backlog.enter(make_request(1), make_sequence(10))
    with pytest.raises(ResourceExhaustedError) as refused:
        backlog.check_room("", 1)
    assert refused.value.limits["bound"] == "requests"
    assert refused.value.limits["num_queued_requests_max"] == "1"


def test_who_has_little_waiting_finds_a_place_behind_a_tenant_that_fills_the_queue():
    backlog = Backlog(num_requests_max=32, num_tokens_max=10_000)
    for serial in range(1, 33):
        backlog.check_room("flood", 10)
        backlog.enter(make_request(serial), make_sequence(10, serial, tenant="flood"))
    for serial in (33, 34):
        with pytest.raises(ResourceExhaustedError) as refused:
            backlog.check_room("flood", 10)
        assert refused.value.limits["num_queued_requests_of_tenant"] == "32"
        backlog.check_room("light", 10)
        backlog.enter(make_request(serial), make_sequence(10, serial, tenant="light"))
    with pytest.raises(ResourceExhaustedError) as refused:
        backlog.check_room("light", 10)
    # A sixteenth is two requests, and then the queue is full for this one too.
    assert refused.value.limits["num_queued_requests"] == "34"
    assert refused.value.limits["num_queued_requests_of_tenant"] == "2"


def test_the_bound_on_tokens_leaves_room_for_who_has_few_of_them_waiting():
    backlog = Backlog(num_requests_max=100, num_tokens_max=160)
    backlog.enter(make_request(1), make_sequence(160, 1, tenant="flood"))
    backlog.check_room("light", 10)
    for tenant, num_tokens in (("light", 11), ("flood", 1)):
        with pytest.raises(ResourceExhaustedError) as refused:
            backlog.check_room(tenant, num_tokens)
        assert refused.value.limits["bound"] == "tokens"
