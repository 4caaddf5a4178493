"""Settings of the scheduler."""

from pydantic import Field

from pageframe.config.option_types import (
    Count,
    Number,
    OptionalFile,
    PolicyNames,
    Seconds,
    SettingsGroup,
    SpeculationName,
    TenantWeights,
)
from pageframe.core.limits import LIMITS


class SchedulingSettings(SettingsGroup):
    """Who runs in a step, and who gives way."""

    token_budget: Count = Field(512, ge=1, le=1 << 20, description="Most new tokens in one step.")
    prefill_chunk_tokens: Count = Field(
        0, ge=0, description="Most tokens of one sequence's prefill in a step; 0 is no bound."
    )
    target_itl_ms: Number = Field(
        0.0,
        ge=0,
        le=3_600_000,
        allow_inf_nan=False,
        description="Most milliseconds between tokens that prefills may cause; 0 is no target.",
    )
    max_num_sequences: Count = Field(
        256, ge=1, le=65536, description="Most sequences that run at once."
    )
    max_queued_requests: Count = Field(
        LIMITS.num_queued_requests_max,
        ge=1,
        le=1 << 20,
        description="Most requests that wait without having run.",
    )
    max_queued_tokens: Count = Field(
        LIMITS.num_queued_tokens_max,
        ge=1,
        le=1 << 34,
        description="Most prompt tokens of requests that wait without having run.",
    )
    tenant_weights: TenantWeights = Field(
        (), description="Parts of tenants in the replica, TENANT=WEIGHT,...; 1 where left out."
    )
    priority_ageing_seconds: Seconds = Field(
        60.0,
        ge=0,
        le=1 << 20,
        allow_inf_nan=False,
        description='Waiting that is worth one level of priority ("60s"); 0 is never.',
    )
    order_policy: str = Field("fair", description="In which order requests come in.")
    admission_policy: str = Field("watermark", description="What is left free for those who run.")
    victim_policy: str = Field("cheapest", description="Who gives way when blocks run short.")
    recovery: str = Field("auto", description="How a preempted sequence comes back.")
    shadow_policy: PolicyNames = Field(
        (), description="Policies that look on and decide nothing, GROUP=NAME,...; or off."
    )
    speculation: SpeculationName = Field(
        SpeculationName.OFF, description="Who guesses tokens ahead, for a step to check."
    )
    num_draft_tokens: Count = Field(
        4,
        ge=1,
        le=LIMITS.num_draft_tokens_max,
        description="Most tokens guessed ahead of one sequence in a step.",
    )
    lookahead: bool = Field(True, description="Plan a step while the one before it runs.")
    record: OptionalFile = Field(
        None, description='File to record every decision of the scheduler in, or "off".'
    )
