"""Settings of KV memory."""

from pydantic import Field

from pageframe.config.option_types import (
    BlockSize,
    Count,
    KvDtype,
    KvDtypeName,
    Seconds,
    SettingsGroup,
    Size,
    TenantQuotas,
)


class MemorySettings(SettingsGroup):
    """How much KV memory there is, and what is kept in it."""

    kv_dtype: KvDtype = Field(KvDtypeName.AUTO, description="Type of cached keys and values.")
    block_size: BlockSize = Field(
        16, description="Tokens in one KV block; a power of two from 1 to 256."
    )
    num_blocks: Count = Field(0, ge=0, description="KV blocks; 0 takes them from kv-memory.")
    num_blocks_max: Count = Field(
        0, ge=0, description="KV blocks that the pool may grow to; 0 is four times num-blocks."
    )
    kv_memory_bytes: Size = Field(
        0, ge=0, description='Memory for KV blocks, such as "2GiB", or "auto".'
    )
    host_kv_memory_bytes: Size = Field(
        0, ge=0, description='Memory of the host tier, such as "4GiB"; 0 is none.'
    )
    prefix_cache: bool = Field(True, description="Share blocks of equal prefixes.")
    eviction_policy: str = Field(
        "lru", min_length=1, description="Which cached block goes first: lru, cost-aware or yours."
    )
    tenant_quotas: TenantQuotas = Field(
        (), description='TENANT=FLOOR:CEILING in blocks, separated by commas, or "off".'
    )
    session_ttl_seconds: Seconds = Field(
        600.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time that the blocks of a chat are kept after a turn ("10m").',
    )
    session_idle_seconds: Seconds = Field(
        60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time until the blocks of an idle chat go to the host tier ("60s").',
    )
    handle_ttl_max_seconds: Seconds = Field(
        86400.0,
        gt=0,
        le=31_536_000,
        allow_inf_nan=False,
        description='Longest time that a prefix may be kept under a handle ("24h").',
    )
