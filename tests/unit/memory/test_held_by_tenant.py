"""What each tenant holds, by name: asked for one tenant it costs as much as that one."""

import pytest

from pageframe.core.replica import TenantQuota
from pageframe.core.step import RefusedBecause
from pageframe.executor.memory.block_columns import Tenants
from unit.executor.small_engine import SmallEngine, request


@pytest.fixture
def small() -> SmallEngine:
    """Ten tenants that have been here, and alice, who holds three blocks."""
    small = SmallEngine(num_blocks=8)
    for index in range(10):
        small.cache(range(index, index + 4), tenant=f"guest {index}")
    small.start(request(1, range(10, 20), tenant="alice"))
    return small


def test_a_block_under_a_ceiling_is_asked_for_without_a_walk_over_all_tenants(small, monkeypatch):
    small.engine.desk.replace_quotas([TenantQuota(tenant="alice", ceiling_blocks=4)])
    alice_id = small.memory.pool.tenants.id_of("alice")
    named = []
    name_of = Tenants.name_of
    monkeypatch.setattr(
        Tenants,
        "name_of",
        lambda self, tenant_id: named.append(tenant_id) or name_of(self, tenant_id),
    )
    assert small.memory.obstacle(alice_id, 1) is None
    assert small.memory.obstacle(alice_id, 2) is RefusedBecause.QUOTA
    assert set(named) == {alice_id}


def test_who_was_never_seen_holds_nothing_and_is_not_known_from_then_on(small):
    held, num_tenants = small.memory.num_held_by_tenant(), len(small.memory.pool.tenants)
    assert held.get("nobody", 0) == 0
    assert "nobody" not in held
    with pytest.raises(KeyError):
        held["nobody"]
    assert len(small.memory.pool.tenants) == num_tenants


def test_it_tells_all_who_were_seen_and_what_they_hold_now(small):
    held = small.memory.num_held_by_tenant()
    assert {name for name, count in held.items() if count} == {"alice"}
    assert len(held) == len(list(held)) == 12
    assert held["alice"] == 3
    small.engine.cancel([1])
    assert held["alice"] == 0
