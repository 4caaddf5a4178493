"""Where the time of one sample went, as its caller saw it (law 9).

    arrival ─ tokenise ─▶ submit ─ transport ─▶ scheduler: waits, steps ─ transport ─▶ done

Every part is measured by whoever it passed through; what they leave over is called unexplained.
Times of two machines are compared here, so clocks that differ show as transport, or as nothing.
"""

from dataclasses import dataclass, replace

from pageframe.core.request import Completion, StallCause


@dataclass(slots=True)
class GatewayTimes:
    """When a request passed the gateway; nanoseconds since the Unix epoch.

    Attributes:
        arrival_ns: It came.
        submit_ns: It was handed to the scheduler; 0 before that.
        lost_ns: When its scheduler was lost, the last time if often; 0 for never.
    """

    arrival_ns: int
    submit_ns: int = 0
    lost_ns: int = 0


def attribute(completion: Completion, times: GatewayTimes, done_ns: int) -> Completion:
    """Complete the account of a sample whose last output is ready to be written at ``done_ns``.

    Returns:
        The completion with ``elapsed_ns``, the transport and what is unexplained. Of a sample that
        no scheduler has run, only ``elapsed_ns`` is known.
    """
    elapsed_ns = max(0, done_ns - times.arrival_ns)
    if not completion.submit_ns or not times.submit_ns:
        return replace(completion, elapsed_ns=elapsed_ns)
    stall_ns = dict(completion.stall_ns)
    compute_ns = completion.compute_ns + times.submit_ns - times.arrival_ns
    _add(stall_ns, StallCause.TRANSPORT, done_ns - completion.end_ns)
    # What a scheduler did before it was lost, nobody is left to tell.
    sent_ns, cause = times.submit_ns, StallCause.TRANSPORT
    if times.lost_ns:
        sent_ns, cause = times.lost_ns, StallCause.EXECUTOR_LOST
    _add(stall_ns, cause, completion.submit_ns - sent_ns)
    explained_ns = compute_ns + sum(stall_ns.values())
    _add(stall_ns, StallCause.UNEXPLAINED, elapsed_ns - explained_ns)
    return replace(completion, elapsed_ns=elapsed_ns, compute_ns=compute_ns, stall_ns=stall_ns)


def _add(stall_ns: dict[StallCause, int], cause: StallCause, waited_ns: int) -> None:
    if waited_ns > 0:
        stall_ns[cause] = stall_ns.get(cause, 0) + waited_ns
