"""Eviction policies under random chains and forks, each beside its slow and obvious version."""

from collections.abc import Sequence
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageframe.executor.memory import eviction
from pageframe.executor.memory.eviction import CostAwareEviction, EvictionPolicy, LruEviction
from pageframe.executor.memory.prefix_index import NO_BLOCK

NUM_BLOCKS = 12
# So few that the costs of neighbours differ a lot.
NUM_BLOCKS_AT_DOUBLE_COST = 2

# A node of the tree of all prefixes; few different tokens make many forks.
Path = tuple[int, ...]
paths = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


class PlainLru:
    """A list, oldest first."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def insert(self, block_ids: Sequence[int], depths: Sequence[int], parent: int) -> None:
        self.order += reversed(block_ids)

    def discard(self, block_id: int) -> None:
        self.order.remove(block_id)

    def take(self, num_blocks: int) -> list[int]:
        victims, self.order = self.order[:num_blocks], self.order[num_blocks:]
        return victims

    def move(self, source: int, target: int) -> None:
        self.order = [target if block_id == source else block_id for block_id in self.order]


class PlainCostAware:
    """A list that is sorted whenever somebody asks; histories as in the formula."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.num_inserted = 0
        self.num_hits = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.least = dict.fromkeys(range(NUM_BLOCKS), 0.0)
        self.entries: list[tuple[float, int, int]] = []

    @property
    def order(self) -> list[int]:
        return [entry[2] for entry in sorted(self.entries)]

    def insert(self, block_ids: Sequence[int], depths: Sequence[int], parent: int) -> None:
        tails: list[float] = []
        for block_id, depth in reversed(list(zip(block_ids, depths, strict=True))):
            self.num_hits[block_id] += 1
            cost = 1 + depth / NUM_BLOCKS_AT_DOUBLE_COST
            tails += [self.clock + self.num_hits[block_id] * cost, self.least[block_id]]
            self.least[block_id] = max(tails)
            self.num_inserted += 1
            self.entries.append((max(tails), self.num_inserted, block_id))
        if parent != NO_BLOCK:
            self.least[parent] = max([self.least[parent], *tails])

    def discard(self, block_id: int) -> None:
        self.entries = [entry for entry in self.entries if entry[2] != block_id]

    def take(self, num_blocks: int) -> list[int]:
        victims = sorted(self.entries)[:num_blocks]
        for priority, _, block_id in victims:
            self.clock = priority
            self.discard(block_id)
            self.num_hits[block_id], self.least[block_id] = 0, 0.0
        return [entry[2] for entry in victims]

    def move(self, source: int, target: int) -> None:
        for history in (self.num_hits, self.least):
            history[target], history[source] = history[source], 0
        self.entries = [
            (*entry[:2], target if entry[2] == source else entry[2]) for entry in self.entries
        ]


class EvictionMachine(RuleBasedStateMachine):
    """Sequences that share prefixes come and go, give up their tails, and blocks move.

    The tree of prefixes is kept here: which block holds which node, and how many sequences hold it.
    """

    policy: EvictionPolicy
    plain: PlainLru | PlainCostAware

    def __init__(self) -> None:
        super().__init__()
        self.block_of: dict[Path, int] = {}
        self.num_references: dict[Path, int] = {}
        self.sequences: list[Path] = []
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    @property
    def cached(self) -> set[int]:
        return {
            block_id for path, block_id in self.block_of.items() if self.num_references[path] == 0
        }

    @property
    def free(self) -> list[int]:
        return sorted(set(range(NUM_BLOCKS)) - set(self.block_of.values()))

    @rule(path=paths)
    def start(self, path: Path) -> None:
        nodes = [path[:end] for end in range(1, len(path) + 1)]
        hits = [node for node in nodes if node in self.block_of]
        assert hits == nodes[: len(hits)], "a tail has outlived its head"
        num_reused = sum(self.num_references[node] == 0 for node in hits)
        num_lacking = len(nodes) - len(hits)
        if num_lacking > len(self.free) + len(self.cached) - num_reused:
            return
        for node in hits:
            self.acquire(node)
        self.take(max(0, num_lacking - len(self.free)))
        for node, block_id in zip(nodes[len(hits) :], self.free, strict=False):
            self.block_of[node] = block_id
            self.num_references[node] = 1
        self.sequences.append(path)

    def acquire(self, node: Path) -> None:
        if self.num_references[node] == 0:
            self.policy.discard(self.block_of[node])
            self.plain.discard(self.block_of[node])
        self.num_references[node] += 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A sequence drops its tail, or everything when it ends."""
        place = data.draw(st.integers(0, len(self.sequences) - 1))
        path = self.sequences.pop(place)
        num_kept = data.draw(st.integers(0, len(path) - 1))
        if num_kept:
            self.sequences.append(path[:num_kept])
        dropped = [path[:end] for end in range(num_kept + 1, len(path) + 1)]
        for node in dropped:
            self.num_references[node] -= 1
        left = [node for node in dropped if self.num_references[node] == 0]
        if left:
            block_ids = [self.block_of[node] for node in left]
            depths = [len(node) - 1 for node in left]
            parent = self.block_of.get(left[0][:-1], NO_BLOCK)
            self.policy.insert(block_ids, depths, parent)
            self.plain.insert(block_ids, depths, parent)

    @rule(num_blocks=st.integers(0, 4))
    def take(self, num_blocks: int) -> None:
        cached = self.cached
        victims = self.policy.take(num_blocks)
        assert victims == self.plain.take(num_blocks)
        assert len(victims) == min(num_blocks, len(cached))
        assert set(victims) <= cached
        for victim in victims:
            self.evict(victim)

    def evict(self, victim: int) -> None:
        (node,) = [path for path, block_id in self.block_of.items() if block_id == victim]
        tails = [path for path in self.block_of if path[:-1] == node]
        assert not tails, f"{node} is given up before {tails}"
        del self.block_of[node]
        del self.num_references[node]

    @precondition(lambda self: self.block_of and self.free)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.block_of)))
        target = data.draw(st.sampled_from(self.free))
        self.policy.move(self.block_of[node], target)
        self.plain.move(self.block_of[node], target)
        self.block_of[node] = target

    @invariant()
    def exactly_the_cached_blocks_are_inside(self) -> None:
        inside = {block_id for block_id in range(NUM_BLOCKS) if block_id in self.policy}
        assert inside == self.cached
        assert len(self.policy) == len(inside)

    @invariant()
    def the_order_is_that_of_the_plain_version(self) -> None:
        assert self.policy.upcoming(NUM_BLOCKS) == self.plain.order
        assert self.policy.upcoming(2) == self.plain.order[:2]

    def teardown(self) -> None:
        self.take(NUM_BLOCKS)
        assert len(self.policy) == 0


class LruMachine(EvictionMachine):
    """Least recently needed first."""

    def make(self) -> None:
        self.policy, self.plain = LruEviction(), PlainLru()


class CostAwareMachine(EvictionMachine):
    """Cheapest to lose first; the heap is built anew as soon as half of its runs are empty."""

    def make(self) -> None:
        self.no_slack = patch.object(eviction, "_NUM_EMPTY_FREE", 0)
        self.no_slack.start()
        self.policy = CostAwareEviction(NUM_BLOCKS_AT_DOUBLE_COST)
        self.plain = PlainCostAware()

    @invariant()
    def runs_count_their_blocks_and_the_heap_its_empty_runs(self) -> None:
        runs = [run for _, _, run in self.policy._heap]
        assert sum(run.num_inside == 0 for run in runs) == self.policy._num_empty
        assert 2 * self.policy._num_empty <= len(runs) + 1
        for run in runs:
            assert len(list(run.upcoming())) == run.num_inside

    def teardown(self) -> None:
        super().teardown()
        self.no_slack.stop()


TestLru = LruMachine.TestCase
TestCostAware = CostAwareMachine.TestCase
TestLru.settings = TestCostAware.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True
)
