"""Settings of several replicas, and of how a gateway chooses among them."""

from pydantic import Field

from pageframe.config.option_types import Count, Number, SettingsGroup


class RoutingSettings(SettingsGroup):
    """How many replicas there are, and which of them a request goes to."""

    replicas: Count = Field(
        1, ge=1, le=64, description="Schedulers, each with an executor, that `up` starts."
    )
    route_prefix_tokens: Count = Field(
        256,
        ge=1,
        le=1 << 20,
        description="Prompts that begin with this many equal tokens go to the same replica.",
    )
    route_headroom: Number = Field(
        0.25,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="How far above the mean load a replica still takes requests; 0.25 is a "
        "quarter.",
    )
