"""What tenants may have: weights, quotas and rates, all that holds at one moment."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pageframe.core.replica import TenantQuota


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRate:
    """How much of a thing a tenant may ask for in a minute; 0 is no bound.

    Attributes:
        tenant: Whose.
        num_requests_per_minute: Requests that may begin.
        num_tokens_per_minute: Tokens of prompts and outputs.
    """

    tenant: str
    num_requests_per_minute: int = 0
    num_tokens_per_minute: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantTerms:
    """The terms of all tenants; who is not named has weight 1, no quota and no rate.

    Attributes:
        weights: Parts in the replica by tenant, above 0.
        quotas: One for each tenant that has any.
        rates: Likewise.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    quotas: tuple[TenantQuota, ...] = ()
    rates: tuple[TenantRate, ...] = ()

    def over(self, base: "TenantTerms") -> "TenantTerms":
        """These terms, and those of ``base`` for whatever they say nothing about."""
        return TenantTerms(
            weights={**base.weights, **self.weights},
            quotas=tuple({it.tenant: it for it in (*base.quotas, *self.quotas)}.values()),
            rates=tuple({it.tenant: it for it in (*base.rates, *self.rates)}.values()),
        )
