"""Room for a newcomer whose tenant is below its part, at the expense of tenants above theirs.

Who waits usually gets a place soon enough: somebody ends. But a tenant that came first and asks for
long outputs could keep another one out of its part for as long as they last. So whoever is next in
line, and has lacked room for a while, may claim it:

    part   a ├─────────┤                 b ├─────────┤
    use    a ├──────────────■■■─┤        b ├───┤ + newcomer ≤ part
                            ╰ gives way: a stays at its part or above

The claim moves uses towards parts, on both sides and never past them. Therefore nothing that was
taken can be claimed back: a is not below its part afterwards, and b not above. And it costs: who
gave way computes again. So a has to be ahead of b, in tokens served, by as much as that; a tenant
that is catching up gives nothing back, and a long context is given up only for a long wait. One
claim in a few steps is all, for its room comes only with the result.
"""

from collections import Counter

from pageframe.scheduler.admission import Admission
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.candidates import Candidates, Shortage
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.shares import Share

# Steps that it has to be next and lack room, and steps between two claims.
_NUM_PATIENT_STEPS = 8
_NUM_VICTIMS_MAX = 8
# Parts are quotients of floats; uses are quotients of counts.
_ROUNDING = 1e-9


class Claims:
    """Names victims for the sake of who is next in line.

    Args:
        roster: Who runs and who waits.
        admission: Knows what a newcomer lacks.
        preemption: Names victims.
        candidates: In which order they are looked at.
    """

    def __init__(
        self, roster: Roster, admission: Admission, preemption: Preemption, candidates: Candidates
    ) -> None:
        self._roster = roster
        self._admission = admission
        self._preemption = preemption
        self._candidates = candidates
        self._claimant_id = 0
        self._since_tick = 0

    def claim(self, builder: PlanBuilder) -> None:
        """Have somebody give way for who is still next behind all admissions of ``builder``."""
        line, tick = self._roster.line, builder.flight.tick
        if not len(line) or len(self._roster.shares) < 2:
            return
        # Who is next exactly is asked at the end: it means to rank tenants served in every step.
        if self._is_new(line.about_next(1)[0], tick) or builder.flight.beneficiaries:
            return
        if tick - self._since_tick < _NUM_PATIENT_STEPS:
            return
        claimant = line.first
        if claimant is None or self._is_new(claimant, tick):
            return
        num_slots, num_blocks = self._admission.lack_of(builder, claimant)
        if max(num_slots, num_blocks) <= 0 or not self._is_entitled(claimant):
            return
        # Whatever comes of it, there is time until the next look.
        self._since_tick = tick
        for victim in self._victims(builder, claimant, num_slots, num_blocks):
            self._preemption.add(builder, victim, claimant)
            builder.plan.victims.num_certain += 1

    def _is_new(self, claimant: Sequence, tick: int) -> bool:
        """Whether another one was next before; then its time begins."""
        if claimant.sequence_id == self._claimant_id:
            return False
        self._claimant_id, self._since_tick = claimant.sequence_id, tick
        return True

    def _is_entitled(self, claimant: Sequence) -> bool:
        """Whether its tenant stays within its part with it."""
        use = self._roster.shares.use_of(
            claimant.share,
            self._roster.capacity,
            num_more=claimant.submission.num_running,
            num_tokens_more=claimant.num_tokens,
        )
        return use <= self._roster.shares.part_of(claimant.share) + _ROUNDING

    def _victims(
        self, builder: PlanBuilder, claimant: Sequence, num_slots: int, num_blocks: int
    ) -> list[Sequence]:
        """Who gives way, so that nothing is lacked any more; nobody, if that takes too many."""
        shares, above = self._roster.shares, self._roster.shares_above
        youngest_first = (s for s in self._roster.youngest_first() if s.share in above)
        shortage = Shortage(builder.flight.tick, builder.flight.planned_ns, max(0, num_blocks), 0)
        victims: list[Sequence] = []
        num_less: Counter[Share] = Counter()
        num_tokens_less: Counter[Share] = Counter()
        for victim in self._candidates.ranked(youngest_first, shortage):
            share = victim.share
            use_left = shares.use_of(
                share,
                self._roster.capacity,
                num_more=-num_less[share] - 1,
                num_tokens_more=-num_tokens_less[share] - victim.num_tokens,
            )
            is_spare = use_left >= shares.part_of(share) - _ROUNDING
            if not is_spare or not _may_give_way(victim, claimant):
                continue
            victims.append(victim)
            num_less[share] += 1
            num_tokens_less[share] += victim.num_tokens
            num_slots -= 1
            num_blocks -= self._candidates.num_own_blocks(victim)
            if max(num_slots, num_blocks) <= 0:
                return victims
            if len(victims) == _NUM_VICTIMS_MAX:
                break
        return []


def _may_give_way(victim: Sequence, claimant: Sequence) -> bool:
    """Whether it runs by itself, is no more urgent, and loses less than its tenant is ahead."""
    share = victim.share
    is_single = victim.search is None and victim.state is SequenceState.RUNNING
    is_urgent = victim.submission.priority > claimant.submission.priority
    num_tokens_ahead = (share.virtual_time - claimant.share.virtual_time) * share.weight
    return is_single and not is_urgent and victim.num_computed <= num_tokens_ahead
