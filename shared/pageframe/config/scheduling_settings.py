"""Settings of the scheduler."""

from pydantic import Field

from pageframe.config.option_types import Count, SettingsGroup
from pageframe.config.values import RecoveryName


class SchedulingSettings(SettingsGroup):
    """Who runs in a step, and who gives way."""

    token_budget: Count = Field(512, ge=1, le=1 << 20, description="Most new tokens in one step.")
    prefill_chunk_tokens: Count = Field(
        0, ge=0, description="Most tokens of one sequence's prefill in a step; 0 is no bound."
    )
    max_num_sequences: Count = Field(
        256, ge=1, le=65536, description="Most sequences that run at once."
    )
    recovery: RecoveryName = Field(
        RecoveryName.RECOMPUTE, description="How a preempted sequence comes back."
    )
    lookahead: bool = Field(True, description="Plan a step while the one before it runs.")
