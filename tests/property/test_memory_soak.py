"""KV memory against a second set of books: a state machine, a seeded soak, and proof that it sees.

The books are those of ``bench.soak``: written from the law, without the code of the memory. They
are compared after every single change; see ``bench/soak``. A failed soak names its seed, its life
and a command that lives that life again.
"""

import logging

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bench.soak.audited_memory import AuditedMemory
from bench.soak.known import KnownSequence
from bench.soak.lives import BLOCK_SIZES, NUM_COMBINATIONS, POOLS, Life, lives_of
from bench.soak.run import soak
from bench.soak.shape import Shape
from pageframe.core.plan import Announcement, Fork, Recovery, StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.sampling import SamplingParams
from pageframe.executor.memory import (
    apply,
    giving_up,
    key_chain,
    publishing,
    retaining,
    sharing,
)
from pageframe.executor.memory.block_columns import BlockColumns
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.block_supply import BlockSupply
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.host_tier import HostTier
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.publishing import Publisher
from pageframe.executor.memory.retention import Retentions
from pageframe.executor.memory.transfers import Transfers

NUM_OPERATIONS = 20_000
TENANTS = ("alice", "bob")
RECOVERIES = (Recovery.RECOMPUTE, Recovery.SWAP, Recovery.TAIL)

tenants = st.sampled_from(TENANTS)
salts = st.integers(0, 1)
chunks = st.sampled_from([1, 3, 7, 30])
# Few letters, so that prompts begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=18)
victims = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(RECOVERIES), st.integers(0, 3)), max_size=4
)


@pytest.fixture(autouse=True)
def quiet():
    """Devices are made to fail here, which the engine would report each time."""
    before = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(wrapper_class=before)


class MemoryMachine(RuleBasedStateMachine):
    """Whatever hypothesis thinks of, one change at a time; the books are compared after each."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(3, 12),
        num_host_slots=st.sampled_from([0, 2, 20]),
        windows=st.sampled_from([(0,), (0,), (5,), (0, 5), (5, 0, 5), (3, 6)]),
        has_prefix_cache=st.sampled_from([True, True, True, False]),
        eviction=st.sampled_from(["lru", "cost-aware"]),
        times=st.sampled_from([(0, 0), (5, 20), (0, 20)]),
    )
    def begin(
        self,
        block_size,
        num_blocks,
        num_host_slots,
        windows,
        has_prefix_cache,
        eviction,
        times,
    ) -> None:
        self.memory = AuditedMemory(
            Shape(
                num_blocks=num_blocks,
                block_size=block_size,
                num_rows=4,
                max_step_tokens=64,
                max_model_len=64,
                num_blocks_max=num_blocks + 3,
                num_host_slots=num_host_slots,
                window_tokens=windows[0] if len(windows) == 1 else 0,
                group_windows=windows if len(windows) > 1 else (),
                has_prefix_cache=has_prefix_cache,
                eviction=eviction,
                session_idle_ns=times[0],
                session_ttl_ns=times[1] if has_prefix_cache else 0,
            )
        )
        self.next_id = 1

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 8),
        tenant=tenants,
        salt=salts,
        session_id=st.sampled_from(["", "chat"]),
        chunk=st.sampled_from([0, 1, 5, 30]),
    )
    def announce(self, prompt, max_tokens, tenant, salt, session_id, chunk) -> None:
        """A newcomer that the pool could hold alone, and perhaps its admission."""
        shape, sequence_id = self.memory.shape, self.new_id()
        prompt = prompt[: shape.num_logical_blocks * shape.block_size - max_tokens + 1] or [0]
        num_logical_blocks = self.memory.num_blocks // shape.num_groups
        if len(prompt) + max_tokens - 1 > num_logical_blocks * shape.block_size:
            return
        salt = salt if shape.has_prefix_cache else sequence_id
        plan = StepPlan(step=0, builds_on=0)
        plan.announce.append(
            Announcement(
                sequence_id=sequence_id,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=SamplingParams(seed=salt, max_tokens=max_tokens, ignore_eos=True),
                tenant=tenant,
                cache_salt=b"%d" % salt,
                session_id=session_id,
            )
        )
        if chunk:
            plan.may.add(sequence_id, 0, chunk)
        self.memory.step(plan)

    @rule(places=st.lists(st.integers(0, 9), min_size=1, max_size=3), chunk=chunks)
    def admit(self, places, chunk) -> None:
        """Sequences that wait, swapped out or not, ask to be let in."""
        plan = StepPlan(step=0, builds_on=0)
        for known in self.chosen(places, running=False):
            plan.may.add(known.sequence_id, known.generation, chunk)
        self.memory.step(plan)

    @rule(
        places=st.lists(st.integers(0, 9), max_size=3),
        chunk=chunks,
        must=st.booleans(),
        victims=victims,
    )
    def step(self, places, chunk, must, victims) -> None:
        """Decodes, chunks of prompts, and victims by recompute, swap or tail where it is full."""
        plan = StepPlan(step=0, builds_on=0)
        for known in self.chosen(places, running=True):
            (plan.must if must else plan.may).add(known.sequence_id, known.generation, chunk)
        for place, recovery, num_blocks in victims:
            for known in self.chosen([place], running=True):
                plan.victims.add(known.sequence_id, known.generation, recovery, 0, num_blocks)
        self.memory.step(plan)

    @rule(place=st.integers(0, 9), num_children=st.integers(1, 3))
    def fork(self, place, num_children) -> None:
        """Children of a running sequence; some are refused."""
        plan = StepPlan(step=0, builds_on=0)
        for known in self.chosen([place], running=True):
            child_ids = [self.new_id() for _ in range(num_children)]
            plan.forks.append(
                Fork(
                    parent_id=known.sequence_id,
                    generation=known.generation,
                    child_ids=child_ids,
                    sample_indices=list(range(1, num_children + 1)),
                    span_ids=[0] * num_children,
                )
            )
        self.memory.step(plan)

    @rule(place=st.integers(0, 9), is_plan=st.booleans())
    def end(self, place, is_plan) -> None:
        """A sequence ends in a plan, or is cancelled between two."""
        ids = [known.sequence_id for known in self.any()[place : place + 1]]
        if is_plan:
            self.memory.step(StepPlan(step=0, builds_on=0, finish=ids))
        else:
            self.memory.cancel(ids)

    @precondition(lambda self: self.memory.shape.has_prefix_cache)
    @rule(tenant=tenants, salt=salts, name=st.sampled_from("xy"), prompt=prompts)
    def retain(self, tenant, salt, name, prompt) -> None:
        self.memory.retain(tenant, salt, name, prompt, 20)

    @rule(tenant=tenants, name=st.sampled_from("xy"))
    def release(self, tenant, name) -> None:
        self.memory.release(tenant, name)

    @rule(tenant=tenants, floor=st.integers(0, 3), room=st.sampled_from([None, 0, 2, 6]))
    def bound(self, tenant, floor, room) -> None:
        ceiling = None if room is None else floor + room
        self.memory.set_quota(
            TenantQuota(tenant=tenant, floor_blocks=floor, ceiling_blocks=ceiling)
        )

    @rule(num_blocks=st.integers(0, 16))
    def resize(self, num_blocks) -> None:
        self.memory.resize(num_blocks)

    @rule(delta_ns=st.sampled_from([1, 6, 25]))
    def pass_time(self, delta_ns) -> None:
        self.memory.pass_time(delta_ns)

    @rule(is_move=st.booleans(), place=st.integers(0, 9))
    def fail(self, is_move, place) -> None:
        """The device fails in a step that lets somebody in."""
        device = self.memory.device
        device.fail_moves, device.fail_execution = is_move, not is_move
        self.admit([place], 30)
        device.fail_moves = device.fail_execution = False

    @rule()
    def take_over(self) -> None:
        self.memory.take_over()
        self.next_id = 1

    @rule()
    def recount(self) -> None:
        self.memory.recount()

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.memory.cancel(list(self.memory.sequences))
        for kind, tenant, name in self.memory.kept.names():
            if kind == "handle":
                self.memory.release(tenant, name)
        self.memory.pass_time(10**9)
        self.memory.recount()
        self.memory.expect_empty()

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def any(self) -> list[KnownSequence]:
        return list(self.memory.sequences.values())

    def chosen(self, places, *, running: bool) -> list[KnownSequence]:
        """Those at these places among the running, or among those that wait; each once."""
        known = [it for it in self.any() if it.is_running == running]
        return [known[place] for place in dict.fromkeys(places) if place < len(known)]


MemoryMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_no_change_breaks_the_law = MemoryMachine.TestCase


def test_twenty_thousand_operations_at_all_sizes_without_a_violation():
    lives = lives_of(NUM_OPERATIONS, 5_000)
    assert len(lives) == NUM_COMBINATIONS == len(BLOCK_SIZES) * len(POOLS) * 3
    outcome = soak(lives, seed=20_000)
    assert outcome.violation == "", f"seed {outcome.seed}, life {outcome.life}"
    assert outcome.num_operations == NUM_OPERATIONS
    # Everything has happened, and more than once.
    assert {
        "COPY_ON_WRITE",
        "DEMOTE",
        "EVICT",
        "INDEX",
        "MOVE",
        "PIN",
        "PROMOTE",
        "RESIZE",
        "SHARE",
        "SWAP_IN",
        "SWAP_OUT",
        "UNINDEX",
        "UNPIN",
    } <= {name for name, number in outcome.num_records.items() if number > 1}


def test_groups_of_layers_with_windows_of_their_own_break_no_law():
    groups = [Life(number, 200) for number in range(NUM_COMBINATIONS, 3 * NUM_COMBINATIONS)]
    outcome = soak(groups, seed=30_000)
    assert outcome.violation == "", f"seed {outcome.seed}, life {outcome.life}"
    assert outcome.num_operations == 200 * 2 * NUM_COMBINATIONS
    assert {"COPY_ON_WRITE", "MOVE", "PIN", "PROMOTE", "SHARE", "SWAP_IN", "UNINDEX"} <= {
        name for name, number in outcome.num_records.items() if number
    }


def test_a_refused_plan_ends_nobody_though_blocks_are_published_before_it():
    outcome = soak([Life(166, 902)], seed=7)
    assert (outcome.violation, outcome.num_operations) == ("", 902)


def test_a_life_can_be_lived_again():
    first, again = (soak([Life(16, 300)], seed=5) for _ in range(2))
    assert first.num_records == again.num_records
    assert soak([Life(16, 300)], seed=6).num_records != first.num_records


def write_in_place(monkeypatch) -> None:
    """Nobody copies before writing."""
    monkeypatch.setattr(apply, "make_writable", lambda *_: None)


def forget_to_fork_references(monkeypatch) -> None:
    """A block table names blocks without a reference."""
    fill = BlockTables.fill

    def fill_twice(tables, row, block_ids, first_block=0) -> None:
        fill(tables, row, block_ids[::-1].copy(), first_block)

    monkeypatch.setattr(BlockTables, "fill", fill_twice)


def publish_early(monkeypatch) -> None:
    """Blocks are found before their step has written them."""
    fork = sharing.fork

    def fork_and_publish(memory, parent, *rest):
        child = fork(memory, parent, *rest)
        memory.sequences.num_computed[parent.row] += 1
        publishing.publish(memory, memory.sequences.running_rows())
        memory.sequences.num_computed[parent.row] -= 1
        return child

    monkeypatch.setattr(apply, "fork", fork_and_publish)


def forget_to_publish(monkeypatch) -> None:
    """Full blocks stay unknown."""
    monkeypatch.setattr(Publisher, "catch_up", lambda *_: None)


def publish_too_late(monkeypatch) -> None:
    """Sequences give up their blocks before what they have filled is published."""
    monkeypatch.setattr(Publisher, "before", lambda *_: None)


def charge_who_pins_last(monkeypatch) -> None:
    """A block that somebody holds already is charged to whoever pins it next."""
    pin = BlockPool.pin

    def pin_and_charge(pool, block_ids, purpose, **options) -> None:
        pin(pool, block_ids, purpose, **options)
        pool.columns.tenant_ids[block_ids] = purpose.tenant_id

    monkeypatch.setattr(BlockPool, "pin", pin_and_charge)


def keep_evicted_keys(monkeypatch) -> None:
    """An evicted block is found under its old key."""
    remove = PrefixIndex.remove

    def remove_and_keep(index, block_id):
        key = remove(index, block_id)
        index._block_of.setdefault(key, block_id)
        return key

    monkeypatch.setattr(PrefixIndex, "remove", remove_and_keep)


def drop_what_is_held(monkeypatch) -> None:
    """The host tier drops what it holds for a sequence that is swapped out."""
    monkeypatch.setattr(HostTier, "hold", lambda *_: None)
    monkeypatch.setattr(HostTier, "drop_hold", lambda *_: None)


def move_in_the_wrong_order(monkeypatch) -> None:
    """Copies of a step go to other targets than the tables say."""
    copy = Transfers.copy

    def copy_back(transfers, sources, targets) -> None:
        copy(transfers, targets, sources)

    monkeypatch.setattr(Transfers, "copy", copy_back)


def ignore_salts(monkeypatch) -> None:
    """Tenants find one another's blocks."""
    root_key = KvMemory.root_key
    monkeypatch.setattr(KvMemory, "root_key", lambda memory, *_: root_key(memory, b"", 0))


def ignore_the_parent(monkeypatch) -> None:
    """A block is named by its own tokens alone."""
    chain_keys = key_chain.chain_keys

    def keys_alone(parent, token_ids, block_size):
        starts = range(0, len(token_ids) // block_size * block_size, block_size)
        blocks = [token_ids[start : start + block_size] for start in starts]
        return [chain_keys(bytes(32), block, block_size)[0] for block in blocks]

    for module in (key_chain, retaining):
        monkeypatch.setattr(module, "chain_keys", keys_alone)


def leave_pins_behind(monkeypatch) -> None:
    """A block moves, and its pins are said to be where it was."""
    monkeypatch.setattr(Retentions, "move_block", lambda *_: None)


def charge_nobody(monkeypatch) -> None:
    """Blocks that are taken up from the cache are not charged to anybody new."""
    take_up = BlockSupply.take_up

    def take_up_for_nobody(supply, block_ids) -> None:
        supply._columns.tenant_ids[block_ids] = 0
        take_up(supply, block_ids)

    monkeypatch.setattr(BlockSupply, "take_up", take_up_for_nobody)


def lose_a_reference(monkeypatch) -> None:
    """Now and then a released block keeps its reference."""
    check_held = BlockColumns.check_held
    calls = iter(range(10**9))

    def check_and_lose(columns, block_ids, *rest) -> None:
        check_held(columns, block_ids, *rest)
        if next(calls) == 60:
            columns.ref_counts[block_ids[0]] += 1

    monkeypatch.setattr(BlockColumns, "check_held", check_and_lose)


@pytest.mark.parametrize(
    "sabotage",
    [
        write_in_place,
        forget_to_fork_references,
        publish_early,
        forget_to_publish,
        publish_too_late,
        charge_who_pins_last,
        keep_evicted_keys,
        drop_what_is_held,
        move_in_the_wrong_order,
        ignore_salts,
        ignore_the_parent,
        leave_pins_behind,
        charge_nobody,
        lose_a_reference,
    ],
)
def test_the_soak_sees_what_is_wrong(sabotage, monkeypatch):
    """An audit that finds nothing where something is broken would be worse than none."""
    sabotage(monkeypatch)
    outcome = soak(lives_of(NUM_OPERATIONS, 5_000), seed=1)
    assert outcome.violation, f"{outcome.num_operations} operations without a finding"


def name_no_group(monkeypatch) -> None:
    """Blocks of all groups have one key, so they find one another's."""
    root_key = KvMemory.root_key
    monkeypatch.setattr(KvMemory, "root_key", lambda memory, salt, *_: root_key(memory, salt))


def mix_up_groups(monkeypatch) -> None:
    """Tokens are written to the block of another group."""
    columns_at = BlockTables.columns_at
    monkeypatch.setattr(
        BlockTables, "columns_at", lambda tables, logical: columns_at(tables, logical)[:, ::-1]
    )


def give_windows_to_all(monkeypatch) -> None:
    """Layers that see everything lose what is far away."""
    monkeypatch.setattr(giving_up, "_FOR_EVER", 7)


def find_too_little(monkeypatch) -> None:
    """A hit does without the first block that is still read."""
    first_blocks = MemoryOptions.first_blocks

    def later(options, position):
        return [
            min(first + bool(window), position // options.block_size)
            for first, window in zip(first_blocks(options, position), options.windows, strict=True)
        ]

    monkeypatch.setattr(MemoryOptions, "first_blocks", later)


@pytest.mark.parametrize(
    "sabotage", [name_no_group, mix_up_groups, give_windows_to_all, find_too_little]
)
def test_the_soak_sees_what_is_wrong_among_groups(sabotage, monkeypatch):
    sabotage(monkeypatch)
    groups = [Life(number, 500) for number in range(NUM_COMBINATIONS, 3 * NUM_COMBINATIONS)]
    outcome = soak(groups, seed=1)
    assert outcome.violation, f"{outcome.num_operations} operations without a finding"
