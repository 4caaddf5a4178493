"""What a scheduler is told once, when it is made."""

from dataclasses import dataclass

from pageframe.core.limits import LIMITS
from pageframe.core.plan import Recovery
from pageframe.core.replica import TenantQuota


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Bounds and choices of one scheduler.

    Attributes:
        token_budget: Most tokens that one step computes.
        max_num_running: Most sequences that run at once.
        prefill_chunk_tokens: Most tokens of one sequence's prefill in a step; 0 is no bound.
        lookahead: Whether step k+1 is planned while step k runs.
        max_queued_requests: Most requests that wait without ever having run.
        max_queued_tokens: Most prompt tokens of those, over all samples.
        recovery: How victims come back; a swap becomes a recompute where there is no host tier.
        shares_prefixes: Whether the executor does, so that it is worth waiting for a leader.
        quotas: Bounds of tenants, as the executor has them.
        first_sequence_id: Id of the first sequence; later ones count up.
    """

    token_budget: int
    max_num_running: int
    prefill_chunk_tokens: int = 0
    lookahead: bool = True
    max_queued_requests: int = LIMITS.num_queued_requests_max
    max_queued_tokens: int = LIMITS.num_queued_tokens_max
    recovery: Recovery = Recovery.RECOMPUTE
    shares_prefixes: bool = True
    quotas: tuple[TenantQuota, ...] = ()
    first_sequence_id: int = 1
