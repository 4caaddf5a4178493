"""What the fake engine knows: sequences, their blocks, and what may be shared. Applies nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pageframe.core.plan import Announcement
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.step import SequenceAccount, StepResult
from pageframe.core.units import ceil_div
from pageframe.testing.fake_pool import FakePool
from pageframe.testing.fake_sequence import FakeSequence


@dataclass(slots=True)
class FakeBooks:
    """Books over one pool.

    Attributes:
        facts: What is served.
        num_hit_tokens: How many tokens of an announcement are in the prefix index; they take
            blocks of their own.
        shares_prefixes: Whether an admission shares whole blocks of those that run.
        ceilings: Most blocks that a tenant may hold, where there is a bound.
        sequences: By id.
        join_order: Running sequences, first admitted first.
        pool: Who holds which block.
    """

    facts: ReplicaFacts
    num_hit_tokens: Callable[[Announcement], int] = lambda _: 0
    shares_prefixes: bool = False
    ceilings: Mapping[str, int] = field(default_factory=dict)
    sequences: dict[int, FakeSequence] = field(default_factory=dict)
    join_order: list[int] = field(default_factory=list)
    pool: FakePool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = FakePool(self.facts.block_size)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.facts.num_blocks - self.pool.num_held

    def account(self) -> PoolAccount:
        """Blocks by state."""
        total, free = self.facts.num_blocks, self.num_free
        return PoolAccount(
            total=total,
            free=free,
            held=total - free,
            host_total=self.facts.num_host_blocks,
            host_used=self.num_host_used(),
        )

    def num_host_used(self) -> int:
        """Blocks that the host tier holds."""
        return sum(
            ceil_div(sequence.num_swapped, self.facts.block_size)
            for sequence in self.sequences.values()
        )

    def runs(self, sequence_id: int, generation: int) -> bool:
        """Whether a sequence runs in this generation."""
        sequence = self.sequences.get(sequence_id)
        return sequence is not None and sequence.is_running and sequence.generation == generation

    def fits(self, trial: FakePool) -> bool:
        """Whether the blocks that ``trial`` holds beyond the pool's are free."""
        return trial.num_held - self.pool.num_held <= self.num_free

    def tenants_over(self, trial: FakePool) -> set[str]:
        """Tenants that would pass their ceilings."""
        return {t for t, ceiling in self.ceilings.items() if trial.num_held_by(t) > ceiling}

    def write(self, pool: FakePool, sequence_id: int, num_tokens: int) -> None:
        """Make the slots of a sequence's next tokens writable in ``pool``."""
        sequence = self.sequences[sequence_id]
        end = min(sequence.num_computed + num_tokens, len(sequence.token_ids))
        pool.write(sequence_id, sequence.num_computed, end, sequence.announcement.tenant)

    def leader(self, sequence: FakeSequence, num_cached: int) -> tuple[int, int]:
        """The first announced sequence that will compute more of the same prefix."""
        for sequence_id, other in self.sequences.items() if self.shares_prefixes else ():
            num_tokens = len(other.token_ids)
            num_common = sequence.num_common(other, num_tokens, self.facts.block_size)
            if num_common > max(num_cached, other.num_computed):
                return sequence_id, num_common
        return 0, 0

    def find(self, sequence: FakeSequence) -> tuple[int, int]:
        """Whose blocks an admission would share (0 for nobody's), and how many tokens it finds."""
        if sequence.num_swapped:
            return 0, min(sequence.num_swapped, len(sequence.token_ids) - 1)
        source_id, num_found = 0, 0
        for sequence_id in self.join_order if self.shares_prefixes else ():
            other = self.sequences[sequence_id]
            num_common = sequence.num_common(other, other.num_computed, self.facts.block_size)
            if num_common > num_found:
                source_id, num_found = sequence_id, num_common
        if not source_id and not sequence.generation:
            hit = self.num_hit_tokens(sequence.announcement)
            num_found = min(hit, len(sequence.token_ids) - 1)
        return source_id, num_found

    def forget(self, sequence_id: int, result: StepResult) -> None:
        """Close the books of a sequence."""
        sequence = self.sequences.pop(sequence_id)
        if sequence.is_running:
            self.join_order.remove(sequence_id)
        self.pool.drop(sequence_id)
        result.accounts[sequence_id] = SequenceAccount(
            num_blocks_peak=sequence.num_blocks_peak,
            num_blocks_shared=sequence.num_blocks_shared,
            num_copies_on_write=self.pool.num_copied.pop(sequence_id, 0),
            num_preemptions=sequence.num_preemptions,
        )
