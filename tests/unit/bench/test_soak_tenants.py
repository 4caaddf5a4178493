"""Who the books of the soak let be charged for a block that somebody pins."""

import numpy as np
import pytest

from bench.soak.audited_memory import AuditedMemory
from bench.soak.entries import ViolationError
from bench.soak.known import Kept
from bench.soak.shape import Shape
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import KvCause
from pageframe.executor.memory.purpose import Purpose


class House:
    """One cached block, and two tenants with a chat of its content each."""

    def __init__(self) -> None:
        self.memory = AuditedMemory(
            Shape(
                num_blocks=4,
                num_blocks_max=4,
                block_size=2,
                num_rows=1,
                max_step_tokens=8,
                max_model_len=16,
            )
        )
        self.run(1, "alice", [1, 1], max_tokens=1)
        ((self.content, self.block_id),) = self.memory.books.found.items()
        self.pool = self.memory._engine.memory.pool
        for name in ("bob", "carol"):
            self.memory.kept.keep(("session", name, ""), Kept(name, [self.content], 10**9))

    def run(self, sequence_id: int, tenant: str, prompt: list[int], max_tokens: int = 4) -> None:
        plan = StepPlan(step=0, builds_on=0)
        plan.announce.append(
            Announcement(
                sequence_id=sequence_id,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=SamplingParams(seed=0, max_tokens=max_tokens, ignore_eos=True),
                tenant=tenant,
                cache_salt=b"0",
            )
        )
        plan.may.add(sequence_id, 0, len(prompt))
        self.memory.step(plan)

    def pin(self, tenant: str, *, is_given_back: bool = False) -> None:
        purpose = Purpose(KvCause.SESSION, tenant_id=self.pool.tenants.id_of(tenant))
        block_ids = np.array([self.block_id])
        if is_given_back:
            self.pool.unpin(block_ids, purpose, is_idle=True)
        else:
            self.pool.pin(block_ids, purpose, is_idle=True)

    def look(self) -> None:
        self.memory._read_records()
        self.memory._end_operation()


def test_whose_pin_took_it_up_is_charged_also_when_only_another_keeps_it():
    house = House()
    house.pin("carol")
    house.pin("bob")
    house.pin("carol", is_given_back=True)
    house.memory.kept.drop(("session", "carol", ""))
    house.look()
    assert house.memory.books.num_held["carol"] == 1


def test_who_has_let_go_before_is_not_charged():
    house = House()
    house.memory.kept.drop(("session", "carol", ""))
    house.look()
    house.pin("carol")
    house.pin("bob")
    house.pin("carol", is_given_back=True)
    with pytest.raises(ViolationError, match="is charged to carol"):
        house.look()


def test_who_lets_go_without_giving_a_pin_back_is_not_charged():
    house = House()
    house.pin("bob")
    house.pool.columns.tenant_ids[house.block_id] = house.pool.tenants.id_of("carol")
    house.memory.kept.drop(("session", "carol", ""))
    with pytest.raises(ViolationError, match="is charged to carol"):
        house.look()


def test_a_block_that_somebody_else_has_by_now_is_charged_to_nobody_who_pinned_it(monkeypatch):
    house = House()
    house.pin("bob")
    house.pin("bob", is_given_back=True)
    with monkeypatch.context() as patch:
        # The soak looks once, behind all this.
        patch.setattr(house.memory, "_end_operation", lambda **_: None)
        # All four blocks: what bob pinned is evicted, and filled anew.
        house.run(2, "carol", [5, 6, 7, 8, 9, 10, 11])
    house.memory._engine.publisher.catch_up()
    house.look()
    block = house.memory.books.blocks[house.block_id]
    assert block.holders == {2: 1}
    assert block.name not in (None, house.content)
    assert house.memory.books.num_held["carol"] == 4
