"""What a scheduler is told once, when it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pageframe.core.limits import LIMITS
from pageframe.core.replica import TenantQuota
from pageframe.core.terms import TenantRate
from pageframe.scheduler.policies.guard import PolicyFault


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Bounds and choices of one scheduler.

    Attributes:
        token_budget: Most tokens that one step computes.
        max_num_running: Most sequences that run at once.
        prefill_chunk_tokens: Most tokens of one sequence's prefill in a step; 0 is no bound.
        target_itl_ns: Longest time between two tokens of a sequence that prefills of others may
            cause, nanoseconds; 0 is no target.
        num_draft_tokens: Most draft tokens of one sequence in a step; 0 for no speculation.
        lookahead: Whether step k+1 is planned while step k runs.
        max_queued_requests: Most requests that wait without ever having run.
        max_queued_tokens: Most prompt tokens of those, over all samples.
        tenant_weights: Weights of tenants in sharing the replica, above 0; 1 where left out.
        priority_ageing_ns: Time of waiting that is worth one level of priority, nanoseconds;
            0 for never.
        policies: Name of a policy by group, see ``policies.registry``; the default of each group
            that is left out.
        shadow_policies: Likewise; nobody looks on where a group is left out.
        on_policy_fault: Told once of each policy that is asked no more.
        shares_prefixes: Whether the executor does, so that it is worth waiting for a leader.
        quotas: Bounds of tenants, as the executor has them.
        rates: How much tenants may ask for in a minute.
        first_sequence_id: Id of the first sequence; later ones count up.
    """

    token_budget: int
    max_num_running: int
    prefill_chunk_tokens: int = 0
    target_itl_ns: int = 0
    num_draft_tokens: int = 0
    lookahead: bool = True
    max_queued_requests: int = LIMITS.num_queued_requests_max
    max_queued_tokens: int = LIMITS.num_queued_tokens_max
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    priority_ageing_ns: int = 0
    policies: Mapping[str, str] = field(default_factory=dict)
    shadow_policies: Mapping[str, str] = field(default_factory=dict)
    on_policy_fault: Callable[[PolicyFault], None] = lambda _: None
    shares_prefixes: bool = True
    quotas: tuple[TenantQuota, ...] = ()
    rates: tuple[TenantRate, ...] = ()
    first_sequence_id: int = 1
