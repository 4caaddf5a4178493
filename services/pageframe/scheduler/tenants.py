"""Quotas as the scheduler sees them: who could never run, who has to wait, who may have to go.

Which blocks are charged to whom is the executor's knowledge, so nothing here is exact. A request
that its ceiling can never hold is refused; an admission is just asked for, and when the answer is
QUOTA its tenant rests for a while, and nobody else does; and before a ceiling could be passed
by running sequences some of its own tenant are named as victims.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pageframe.core.errors import OutOfRangeError
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota, fitting_quotas
from pageframe.core.request import Submission
from pageframe.scheduler.request import num_blocks_needed
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence as RunningSequence

# Blocks of a tenant may come free by other ways than the end of its sequences: a pin that expires
# in a step, a block that another tenant takes over.
_NUM_RESTING_STEPS = 8


@dataclass(frozen=True, slots=True)
class _Rest:
    """Since when a tenant is not asked for again, and how the pool was."""

    tick: int
    account: PoolAccount


class Tenants:
    """What quotas mean for plans.

    Args:
        roster: Who runs.
        quotas: Bounds, one for each tenant that has any.
    """

    def __init__(self, roster: Roster, quotas: Sequence[TenantQuota]) -> None:
        self._roster = roster
        self._quotas = {quota.tenant: quota for quota in quotas}
        self._resting: dict[str, _Rest] = {}

    def check_fits(self, submission: Submission, facts: ReplicaFacts) -> None:
        """Refuse a request that its tenant's quota can never hold, or what others are assured of.

        Raises:
            OutOfRangeError: OVER_QUOTA.
        """
        tenant = submission.tenant
        quotas = fitting_quotas(self._quotas.values(), facts.num_blocks)
        num_assured = sum(q.floor_blocks for q in quotas if q.tenant != tenant)
        num_blocks_max = max(0, facts.num_blocks - num_assured)
        quota = self._quotas.get(tenant)
        if quota is not None and quota.ceiling_blocks is not None:
            num_blocks_max = min(num_blocks_max, quota.ceiling_blocks)
        num_blocks = num_blocks_needed(submission, facts)
        if num_blocks > num_blocks_max:
            raise OutOfRangeError(
                "OVER_QUOTA",
                f"the request needs {num_blocks} blocks; tenant {tenant!r} can hold "
                f"{num_blocks_max} at most",
                num_blocks_needed=num_blocks,
                num_blocks_max=num_blocks_max,
                num_blocks_of_others=num_assured,
            )

    def rest(self, tenant: str, tick: int, account: PoolAccount) -> None:
        """``tenant`` met its ceiling in ``tick``: an admission refused, or a victim taken."""
        self._resting[tenant] = _Rest(tick, account)

    def wake(self) -> None:
        """Somebody changed the pool, or the quotas; ask for everybody again."""
        self._resting.clear()

    def set_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Tenants have these bounds from now on, and those not named none."""
        self._quotas = {quota.tenant: quota for quota in quotas}
        self.wake()

    def prepare(self, tick: int, account: PoolAccount) -> None:
        """End the rest of those for whom something may have changed before ``tick``."""
        departed, is_idle = self._roster.departed, not self._roster.running
        for tenant, rest in list(self._resting.items()):
            is_rested = tick - rest.tick > _NUM_RESTING_STEPS
            if tenant in departed or is_rested or (is_idle and account != rest.account):
                del self._resting[tenant]
        departed.clear()

    def is_resting(self, tenant: str) -> bool:
        """Whether it is of no use to ask for ``tenant`` now."""
        return tenant in self._resting

    def excess(self, tick: int) -> Iterable[tuple[list[RunningSequence], int]]:
        """Tenants that could pass their ceilings in ``tick``.

        Walks over the running sequences of those that have a ceiling. Blocks that are shared count
        for each of them, so this is an upper bound.

        Yields:
            Running sequences in the order of joining, and by how many blocks they could pass.
        """
        ceilings = {
            quota.tenant: quota.ceiling_blocks
            for quota in self._quotas.values()
            if quota.ceiling_blocks is not None
        }
        if not ceilings:
            return
        running: dict[str, list[RunningSequence]] = {}
        for sequence in self._roster.running.values():
            if sequence.submission.tenant in ceilings:
                running.setdefault(sequence.submission.tenant, []).append(sequence)
        for tenant, sequences in running.items():
            num_blocks = sum(self._num_blocks(sequence, tick) for sequence in sequences)
            if num_blocks > ceilings[tenant]:
                yield sequences, num_blocks - ceilings[tenant]

    def _num_blocks(self, sequence: RunningSequence, tick: int) -> int:
        """Blocks that ``sequence`` may hold after ``tick``; no ``may`` entry passes a ceiling."""
        if sequence.search is not None:
            return sequence.search.num_blocks(self._roster.capacity)
        num_tokens = sequence.num_planned
        if sequence.decode_origin is not None:
            num_tokens = sequence.decode_origin + tick + 1 + self._roster.decodes.num_tokens_ahead
            num_tokens = min(num_tokens, sequence.num_positions_max)
        return self._roster.capacity.num_blocks_peak(num_tokens)
