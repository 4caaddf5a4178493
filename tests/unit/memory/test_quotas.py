import random

import pytest

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.executor.memory.quotas import Quotas, TenantQuota


def quota(tenant: str, floor: int = 0, ceiling: int | None = None) -> TenantQuota:
    return TenantQuota(tenant=tenant, floor_blocks=floor, ceiling_blocks=ceiling)


def quotas_of(*quotas: TenantQuota, num_blocks_total: int = 10) -> Quotas:
    made = Quotas()
    made.replace(quotas, num_blocks_total)
    return made


def test_without_quotas_everybody_may_take_everything():
    quotas = Quotas()
    assert quotas.is_empty
    assert list(quotas) == []
    assert quotas.allowance("a", 7, {"b": 3}) == 7
    assert quotas.num_over_ceiling("a", 1000, {"a": 3}) == 0
    assert quotas.quota_of("a") == quota("a")


def test_what_a_floor_lacks_is_kept_from_the_others():
    quotas = quotas_of(quota("a", floor=4))
    assert quotas.allowance("b", 10, {}) == 6
    assert quotas.allowance("b", 9, {"a": 1}) == 6
    assert quotas.allowance("b", 4, {"a": 6}) == 4
    assert quotas.allowance("a", 10, {}) == 10


def test_floors_of_several_tenants_add_up():
    quotas = quotas_of(quota("a", floor=4), quota("b", floor=3))
    assert quotas.allowance("c", 10, {}) == 3
    assert quotas.allowance("a", 10, {}) == 7
    assert quotas.allowance("b", 8, {"a": 2}) == 6


def test_a_ceiling_bounds_its_own_tenant_alone():
    quotas = quotas_of(quota("a", ceiling=4))
    assert quotas.allowance("a", 10, {}) == 4
    assert quotas.allowance("a", 7, {"a": 3}) == 1
    assert quotas.allowance("b", 7, {"a": 3}) == 7


def test_nobody_may_take_less_than_nothing():
    quotas = quotas_of(quota("a", floor=4, ceiling=5))
    assert quotas.allowance("b", 2, {}) == 0
    assert quotas.allowance("a", 9, {"a": 8}) == 0
    assert Quotas().allowance("a", -1, {}) == 0


def test_a_ceiling_of_zero_shuts_a_tenant_out():
    quotas = quotas_of(quota("a", ceiling=0))
    assert quotas.allowance("a", 10, {}) == 0
    assert quotas.num_over_ceiling("a", 1, {}) == 1


def test_a_full_pool_is_told_from_a_ceiling():
    quotas = quotas_of(quota("a", ceiling=4), quota("b", floor=9))
    assert quotas.num_over_ceiling("a", 2, {"a": 2}) == 0
    assert quotas.num_over_ceiling("a", 3, {"a": 2}) == 1
    assert quotas.allowance("c", 9, {}) == 0
    assert quotas.num_over_ceiling("c", 9, {}) == 0
    assert quotas.num_over_ceiling("b", 100, {}) == 0


def test_a_quota_that_bounds_nothing_is_none():
    quotas = quotas_of(quota("a", floor=2), quota("b"))
    assert list(quotas) == [quota("a", floor=2)]
    quotas.set(quota("a"), 10)
    assert quotas.is_empty
    assert quotas.allowance("b", 10, {}) == 10


def test_a_new_quota_takes_the_place_of_the_old_one():
    quotas = quotas_of(quota("a", floor=6), quota("b", floor=4))
    quotas.set(quota("a", floor=3, ceiling=8), 10)
    assert list(quotas) == [quota("a", floor=3, ceiling=8), quota("b", floor=4)]
    assert quotas.quota_of("a") == quota("a", floor=3, ceiling=8)
    assert len(quotas) == 2
    quotas.replace([quota("c", ceiling=1)], 10)
    assert list(quotas) == [quota("c", ceiling=1)]
    assert quotas.allowance("d", 10, {}) == 10


@pytest.mark.parametrize(
    ("wrong", "reason", "limits"),
    [
        (quota("b", floor=-1), "QUOTA_NEGATIVE", {"floor_blocks": "-1"}),
        (
            quota("b", ceiling=-2),
            "QUOTA_NEGATIVE",
            {"floor_blocks": "0", "ceiling_blocks": "-2"},
        ),
        (
            quota("b", floor=3, ceiling=2),
            "QUOTA_FLOOR_ABOVE_CEILING",
            {"floor_blocks": "3", "ceiling_blocks": "2"},
        ),
    ],
)
def test_a_malformed_quota_changes_nothing(wrong, reason, limits):
    quotas = quotas_of(quota("a", floor=4))
    for change in (
        lambda: quotas.set(wrong, 10),
        lambda: quotas.replace([quota("c", floor=1), wrong], 10),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            change()
        assert caught.value.reason == reason
        assert caught.value.limits == limits
        assert list(quotas) == [quota("a", floor=4)]
        assert quotas.allowance("c", 10, {}) == 6


def test_floors_that_do_not_fit_change_nothing():
    quotas = quotas_of(quota("a", floor=4))
    for change in (
        lambda: quotas.set(quota("b", floor=7), 10),
        lambda: quotas.replace([quota("b", floor=7), quota("c", floor=4)], 10),
    ):
        with pytest.raises(PreconditionError) as caught:
            change()
        assert caught.value.reason == "QUOTA_FLOORS_EXCEED_POOL"
        assert caught.value.limits == {"num_floor_blocks": "11", "num_blocks_total": "10"}
        assert list(quotas) == [quota("a", floor=4)]
    quotas.set(quota("b", floor=6), 10)
    quotas.set(quota("a", floor=3), 10)
    assert quotas.allowance("c", 10, {}) == 1


def test_a_tenant_with_two_quotas_changes_nothing():
    quotas = quotas_of(quota("a", floor=4))
    with pytest.raises(InvalidRequestError) as caught:
        quotas.replace([quota("b", floor=1), quota("b", floor=2)], 10)
    assert caught.value.reason == "QUOTA_TENANT_TWICE"
    assert caught.value.limits == {"num_quotas": "2", "num_tenants": "1"}
    assert list(quotas) == [quota("a", floor=4)]


def test_a_smaller_pool_has_to_hold_all_floors():
    quotas = quotas_of(quota("a", floor=4), quota("b", floor=3, ceiling=20))
    quotas.check_total(7)
    with pytest.raises(PreconditionError) as caught:
        quotas.check_total(6)
    assert caught.value.reason == "QUOTA_FLOORS_EXCEED_POOL"
    assert caught.value.limits == {"num_floor_blocks": "7", "num_blocks_total": "6"}


@pytest.mark.parametrize("seed", range(20))
def test_who_takes_no_more_than_allowed_keeps_every_floor_in_reach(seed):
    """From an empty pool: a tenant below its floor can always take what it lacks."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    num_total = chance.randint(10, 60)
    tenants = ["a", "b", "c", "d"]
    floors = dict.fromkeys(tenants, 0)
    for _ in range(chance.randint(0, num_total)):
        floors[chance.choice(tenants)] += 1
    ceilings = {
        tenant: chance.choice([None, chance.randint(floors[tenant], num_total)])
        for tenant in tenants
    }
    quotas = quotas_of(
        *(quota(tenant, floors[tenant], ceilings[tenant]) for tenant in tenants),
        num_blocks_total=num_total,
    )
    held = dict.fromkeys(tenants, 0)
    num_refused = 0
    for _ in range(400):
        tenant = chance.choice(tenants)
        if chance.random() < 0.4:
            held[tenant] -= chance.randint(0, held[tenant])
        num_available = num_total - sum(held.values())
        num_allowed = quotas.allowance(tenant, num_available, held)
        num_wanted = chance.randint(0, num_total)
        num_refused += num_wanted > num_allowed
        held[tenant] += min(num_wanted, num_allowed)
        num_available = num_total - sum(held.values())
        assert num_available >= 0
        for other in tenants:
            assert ceilings[other] is None or held[other] <= ceilings[other]
            num_lacking = max(0, floors[other] - held[other])
            assert quotas.allowance(other, num_available, held) >= num_lacking
    assert num_refused, "no request met a bound"
