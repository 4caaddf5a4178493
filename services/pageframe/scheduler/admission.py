"""Who comes in: preempted sequences first, then new ones; and who is announced ahead of that."""

from itertools import chain

from pageframe.core.request import StallCause
from pageframe.scheduler.budget import Draft
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.prefix_wait import PrefixWait
from pageframe.scheduler.queues import TenantQueues
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState
from pageframe.scheduler.tenants import Tenants
from pageframe.scheduler.tracing import SchedulerTracer

# What could be admitted in the next few steps: more would only fill the executor's memory.
_NUM_STEPS_AHEAD = 4
_NUM_SEQUENCES_AHEAD = 8
# Looking for somebody who need not wait for a leader ends after this many who do.
_NUM_PASSED_OVER_MAX = 32


class Admission:
    """Lets sequences in as long as nothing is promised twice."""

    def __init__(
        self,
        roster: Roster,
        preemption: Preemption,
        prefix_wait: PrefixWait,
        tenants: Tenants,
        tracer: SchedulerTracer,
    ) -> None:
        self._roster = roster
        self._preemption = preemption
        self._prefix_wait = prefix_wait
        self._tenants = tenants
        self._tracer = tracer

    def admit(self, draft: Draft) -> None:
        """Fill the draft in order; the first that has to wait holds back all behind it.

        Except when it waits for its tenant's quota, which is no reason for another tenant to wait,
        or for a leader: then those behind it may pass.
        """
        for queue in (self._roster.preempted, self._roster.waiting):
            if not self._admit_from(draft, queue):
                return

    def announce_ahead(self, draft: Draft) -> None:
        """Send the tokens of those that are next, while the message stays small."""
        roster = self._roster
        num_tokens_ahead = _NUM_STEPS_AHEAD * roster.capacity.token_budget
        heads = chain(
            roster.preempted.first_few(_NUM_SEQUENCES_AHEAD),
            roster.waiting.first_few(_NUM_SEQUENCES_AHEAD),
        )
        for sequence in heads:
            if num_tokens_ahead <= 0:
                return
            num_tokens_ahead -= sequence.num_tokens
            if sequence.knowledge is Knowledge.UNKNOWN:
                if not draft.can_announce(sequence):
                    return
                draft.announce(sequence)

    def _admit_from(self, draft: Draft, queue: TenantQueues) -> bool:
        """Whether all that may come in from ``queue`` did."""
        walk = queue.walk()
        num_passed_over = 0
        while (sequence := walk.current) is not None:
            if self._tenants.is_resting(sequence.submission.tenant):
                self._explain(draft, sequence, StallCause.QUOTA)
                walk.pass_tenant()
                continue
            obstacle = self._obstacle_to_all(draft)
            leader = None if obstacle else self._prefix_wait.leader_of(draft, sequence)
            obstacle = obstacle or self._obstacle(draft, sequence, needs_blocks=leader is None)
            if obstacle is not None:
                self._explain(draft, sequence, obstacle)
                return False
            if leader is None:
                self._take(draft, sequence)
                walk.go_on(is_taken=True)
                continue
            if sequence.knowledge is Knowledge.UNKNOWN:
                draft.announce(sequence)
            self._explain(draft, sequence, StallCause.PREFIX_WAIT, leader)
            num_passed_over += 1
            if num_passed_over < _NUM_PASSED_OVER_MAX:
                walk.go_on(is_taken=False)
            else:
                walk.pass_tenant()
        return True

    def _obstacle_to_all(self, draft: Draft) -> StallCause | None:
        """Why nobody comes in any more."""
        roster = self._roster
        if draft.num_tokens_left <= 0:
            return StallCause.TOKEN_BUDGET
        num_running = len(roster.running) + roster.num_siblings_promised
        if num_running >= roster.capacity.max_num_running:
            return StallCause.QUEUE
        return StallCause.KV_FULL if draft.flight.is_short else None

    def _obstacle(
        self, draft: Draft, sequence: Sequence, *, needs_blocks: bool
    ) -> StallCause | None:
        """Why ``sequence`` does not come in, and cannot even be announced if it has to wait."""
        if needs_blocks and self._num_blocks_required(draft, sequence) > draft.num_blocks_left:
            return StallCause.KV_FULL
        if sequence.knowledge is Knowledge.UNKNOWN and not draft.can_announce(sequence):
            return StallCause.QUEUE
        return None

    def _num_blocks_required(self, draft: Draft, sequence: Sequence) -> int:
        """Blocks for all its tokens, and some more for those who run already and still grow.

        And one for each sibling, which is left out as long as nobody else runs: then it need not
        fork for all of them.
        """
        capacity = self._roster.capacity
        if not self._roster.running:
            return capacity.num_blocks(sequence.num_tokens)
        is_cooling = self._preemption.is_cooling(draft.flight.tick)
        num_tokens = sequence.num_positions_max if is_cooling else sequence.num_tokens
        num_blocks = capacity.num_blocks(num_tokens) - self._num_blocks_shared(sequence)
        return num_blocks + self._num_siblings(sequence) + capacity.num_blocks_watermark

    def _num_blocks_shared(self, sequence: Sequence) -> int:
        """Blocks that it is expected to find in the hands of others.

        That may prove wrong: what was found may be cached, or in the host tier. Then the executor
        refuses the admission, and the next one is asked for only when all its blocks are there.
        """
        if not sequence.may_share:
            return 0
        return sequence.num_cached_tokens // self._roster.capacity.block_size

    def _num_siblings(self, sequence: Sequence) -> int:
        if sequence.sample_index:
            return 0
        return len(self._roster.request_of(sequence).siblings)

    def _take(self, draft: Draft, sequence: Sequence) -> None:
        roster = self._roster
        if sequence.knowledge is Knowledge.UNKNOWN:
            draft.announce(sequence)
        num_blocks = roster.capacity.num_blocks(sequence.num_tokens)
        draft.num_blocks_left -= num_blocks - self._num_blocks_shared(sequence)
        draft.num_blocks_left -= self._num_siblings(sequence)
        roster.admit(sequence, draft.flight.tick)
        draft.ask(sequence, draft.plan.may)
        roster.expect(sequence)

    def _explain(
        self,
        draft: Draft,
        sequence: Sequence,
        cause: StallCause,
        culprit: Sequence | None = None,
    ) -> None:
        # A preempted sequence waits because it was preempted, whatever keeps it out by now.
        if sequence.state is SequenceState.WAITING:
            self._tracer.begin_stall(sequence, cause, draft.flight.planned_ns, culprit)
