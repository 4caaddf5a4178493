"""What a gateway adds to the account of a sample: transport, and what nobody can explain."""

from pageframe.core.request import Completion, StallCause
from pageframe.core.step import FinishReason
from pageframe.gateway.attribution import GatewayTimes, attribute

MS = 1_000_000


def completion(**fields) -> Completion:
    return Completion(handle=1, sample_index=0, finish_reason=FinishReason.STOP, **fields)


def test_every_millisecond_has_a_name():
    account = attribute(
        completion(
            stall_ns={StallCause.QUEUE: 5 * MS, StallCause.TRANSPORT: 1 * MS},
            compute_ns=20 * MS,
            submit_ns=113 * MS,
            end_ns=140 * MS,
        ),
        GatewayTimes(arrival_ns=100 * MS, submit_ns=110 * MS),
        done_ns=147 * MS,
    )
    assert account.elapsed_ns == 47 * MS
    # Ten milliseconds of tokenising come to twenty of steps.
    assert account.compute_ns == 30 * MS
    assert account.stall_ns == {
        StallCause.QUEUE: 5 * MS,
        StallCause.TRANSPORT: (1 + 3 + 7) * MS,
        StallCause.UNEXPLAINED: 1 * MS,
    }
    assert account.compute_ns + sum(account.stall_ns.values()) == account.elapsed_ns


def test_what_is_explained_to_the_end_leaves_nothing():
    account = attribute(
        completion(compute_ns=4 * MS, submit_ns=1 * MS, end_ns=5 * MS),
        GatewayTimes(arrival_ns=1 * MS, submit_ns=1 * MS),
        done_ns=5 * MS,
    )
    assert account.stall_ns == {}


def test_clocks_that_disagree_make_no_negative_time():
    account = attribute(
        completion(compute_ns=4 * MS, submit_ns=50 * MS, end_ns=54 * MS),
        GatewayTimes(arrival_ns=90 * MS, submit_ns=100 * MS),
        done_ns=53 * MS,
    )
    assert account.elapsed_ns == 0
    assert all(waited_ns > 0 for waited_ns in account.stall_ns.values())


def test_a_sample_that_no_scheduler_ran_has_an_end_and_no_account():
    account = attribute(completion(), GatewayTimes(arrival_ns=10), done_ns=25)
    assert (account.elapsed_ns, account.compute_ns, account.stall_ns) == (15, 0, {})


def test_what_a_lost_scheduler_did_is_not_made_up():
    account = attribute(
        completion(compute_ns=10 * MS, submit_ns=80 * MS, end_ns=90 * MS),
        GatewayTimes(arrival_ns=1 * MS, submit_ns=1 * MS, lost_ns=30 * MS),
        done_ns=90 * MS,
    )
    assert account.stall_ns == {
        StallCause.EXECUTOR_LOST: 50 * MS,
        StallCause.UNEXPLAINED: 29 * MS,
    }
