"""Bounds per tenant, in blocks of the pool.

    floor     blocks that other tenants cannot take, held or not
    ceiling   blocks that the tenant itself cannot pass

A floor is not a reservation: nothing is set aside. What a floor lacks is subtracted from what the
others may take, so that blocks of a floor are given out only to their tenant:

    may take = min(ceiling - held, available - what the floors of the others still lack)

The idea of a protected minimum beside a hard maximum is that of memory.min and memory.max of Linux
control groups (cgroup v2).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.replica import TenantQuota

__all__ = ["Quotas", "TenantQuota"]


class Quotas:
    """Bounds per tenant, in blocks; a tenant without a quota has floor 0 and no ceiling.

    A ceiling of 0 shuts a tenant out. Where a method takes ``held``, that is tenant to blocks
    charged to it; absent means none.
    """

    def __init__(self) -> None:
        self._quotas: dict[str, TenantQuota] = {}
        # Floors above 0 alone: most tenants have none, and ``allowance`` walks these.
        self._floors: dict[str, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no tenant has any bound."""
        return not self._quotas

    def __len__(self) -> int:
        return len(self._quotas)

    def __iter__(self) -> Iterator[TenantQuota]:
        """The quotas that bound something, in the order in which their tenants first got one."""
        return iter(self._quotas.values())

    def quota_of(self, tenant: str) -> TenantQuota:
        """The tenant's bounds, whether any were set or not."""
        return self._quotas.get(tenant) or TenantQuota(tenant=tenant)

    def floors(self) -> Iterable[tuple[str, int]]:
        """Tenants that have a floor above 0, and their floors in blocks."""
        return self._floors.items()

    def set(self, quota: TenantQuota, num_blocks_total: int) -> None:
        """Give one tenant new bounds in a pool of ``num_blocks_total``. Blocks held stay held.

        Raises:
            InvalidRequestError: reason QUOTA_NEGATIVE, a bound is below 0, or
                QUOTA_FLOOR_ABOVE_CEILING; nothing was changed.
            PreconditionError: reason QUOTA_FLOORS_EXCEED_POOL, the floors of all tenants add up to
                more than the pool; nothing was changed.
        """
        self._adopt({**self._quotas, quota.tenant: quota}, num_blocks_total)

    def replace(self, quotas: Sequence[TenantQuota], num_blocks_total: int) -> None:
        """Give the tenants named these bounds, and all others none.

        Raises:
            InvalidRequestError: as for ``set``, or reason QUOTA_TENANT_TWICE, one tenant has two
                quotas; nothing was changed.
            PreconditionError: as for ``set``; nothing was changed.
        """
        named = {quota.tenant: quota for quota in quotas}
        if len(named) != len(quotas):
            raise InvalidRequestError(
                "QUOTA_TENANT_TWICE",
                f"{len(quotas)} quotas name {len(named)} tenants; give each tenant one",
                num_quotas=len(quotas),
                num_tenants=len(named),
            )
        self._adopt(named, num_blocks_total)

    def check_total(self, num_blocks_total: int) -> None:
        """Ask whether all floors fit into a pool of ``num_blocks_total``, as before a resize.

        Raises:
            PreconditionError: reason QUOTA_FLOORS_EXCEED_POOL; they do not.
        """
        _check_floors(self._floors.values(), num_blocks_total)

    def allowance(self, tenant: str, num_available: int, held: Mapping[str, int]) -> int:
        """How many more blocks the tenant may take to hold, of ``num_available``; never below 0.

        O(1) without quotas, O(tenants with a floor) otherwise.
        """
        if not self._quotas:
            return max(0, num_available)
        num_allowed = num_available
        for other, floor in self._floors.items():
            if other != tenant:
                num_allowed -= max(0, floor - held.get(other, 0))
        quota = self._quotas.get(tenant)
        if quota is not None and quota.ceiling_blocks is not None:
            num_allowed = min(num_allowed, quota.ceiling_blocks - held.get(tenant, 0))
        return max(0, num_allowed)

    def have_room(
        self, wanted: Mapping[str, int], num_available: int, held: Mapping[str, int]
    ) -> bool:
        """Whether tenants may take so many more blocks each, whoever takes them first.

        O(tenants named, and those with a floor).
        """
        kept = {tenant: floor - held.get(tenant, 0) for tenant, floor in self._floors.items()}
        num_taken = sum(
            max(wanted.get(tenant, 0), kept.get(tenant, 0)) for tenant in {**wanted, **kept}
        )
        return num_taken <= num_available and not any(
            self.num_over_ceiling(tenant, num_blocks, held) for tenant, num_blocks in wanted.items()
        )

    def num_over_ceiling(self, tenant: str, num_more: int, held: Mapping[str, int]) -> int:
        """By how many blocks ``num_more`` would pass the tenant's own ceiling; never below 0.

        Tells a refusal that only the tenant can mend from one of a full pool.
        """
        quota = self._quotas.get(tenant)
        if quota is None or quota.ceiling_blocks is None:
            return 0
        return max(0, held.get(tenant, 0) + num_more - quota.ceiling_blocks)

    def _adopt(self, quotas: Mapping[str, TenantQuota], num_blocks_total: int) -> None:
        for quota in quotas.values():
            _check_bounds(quota)
        floors = {quota.tenant: quota.floor_blocks for quota in quotas.values()}
        _check_floors(floors.values(), num_blocks_total)
        # A quota that bounds nothing is none, so that ``is_empty`` means what it says.
        self._quotas = {
            tenant: quota for tenant, quota in quotas.items() if quota != TenantQuota(tenant=tenant)
        }
        self._floors = {tenant: floor for tenant, floor in floors.items() if floor}


def _check_bounds(quota: TenantQuota) -> None:
    floor, ceiling = quota.floor_blocks, quota.ceiling_blocks
    limits = {"floor_blocks": floor}
    if ceiling is not None:
        limits["ceiling_blocks"] = ceiling
    if floor < 0 or (ceiling is not None and ceiling < 0):
        raise InvalidRequestError(
            "QUOTA_NEGATIVE",
            f"the quota of tenant {quota.tenant!r} has floor {floor} and ceiling {ceiling}; "
            "give numbers of blocks from 0",
            **limits,
        )
    if ceiling is not None and floor > ceiling:
        raise InvalidRequestError(
            "QUOTA_FLOOR_ABOVE_CEILING",
            f"the quota of tenant {quota.tenant!r} has floor {floor} above ceiling {ceiling}",
            **limits,
        )


def _check_floors(floors: Iterable[int], num_blocks_total: int) -> None:
    num_floor_blocks = sum(floors)
    if num_floor_blocks > num_blocks_total:
        raise PreconditionError(
            "QUOTA_FLOORS_EXCEED_POOL",
            f"the floors of all tenants add up to {num_floor_blocks} blocks, "
            f"the pool has {num_blocks_total}",
            num_floor_blocks=num_floor_blocks,
            num_blocks_total=num_blocks_total,
        )
