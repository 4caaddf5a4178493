"""What policies are seen doing: faults, and other opinions of shadows, into trace and log."""

from collections.abc import Callable

from pageframe.core.clock import Clock
from pageframe.scheduler.flights import Flights
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.policies.chosen import Policies
from pageframe.scheduler.policies.guard import PolicyFault
from pageframe.scheduler.policies.shadow import Disagreement
from pageframe.scheduler.tracing import SchedulerTracer


class Witness:
    """Passes on what happens to policies, with the step in which it does.

    Args:
        tracer: Writes spans.
        flights: Knows which plan is being made.
        clock: Source of time.
        tell: Told of each fault once; for a log.
    """

    def __init__(
        self,
        tracer: SchedulerTracer,
        flights: Flights,
        clock: Clock,
        tell: Callable[[PolicyFault], None],
    ) -> None:
        self._tracer = tracer
        self._flights = flights
        self._clock = clock
        self._tell = tell

    def on_fault(self, fault: PolicyFault) -> None:
        """A policy is asked no more."""
        self._tracer.policy_fault(fault, self._flights.next_step, self._clock.now_ns())
        self._tell(fault)

    def on_disagreement(self, disagreement: Disagreement) -> None:
        """A shadow would have decided otherwise."""
        self._tracer.disagreement(disagreement, self._flights.next_step, self._clock.now_ns())


def policies_of(
    options: SchedulerOptions, tracer: SchedulerTracer, flights: Flights, clock: Clock
) -> Policies:
    """The policies that ``options`` name, with a witness.

    Raises:
        InvalidRequestError: POLICY_UNKNOWN or POLICY_GROUP_UNKNOWN.
        PreconditionError: POLICY_BROKEN.
    """
    return Policies(
        options.policies,
        options.shadow_policies,
        clock=clock,
        witness=Witness(tracer, flights, clock, options.on_policy_fault),
    )
