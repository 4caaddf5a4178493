"""Who comes in, in the order of the line; and who is announced ahead of that."""

from pageframe.core.request import StallCause
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.culprits import culprit_of
from pageframe.scheduler.flights import Flights
from pageframe.scheduler.line import Walk
from pageframe.scheduler.policies.protocols import AdmissionPolicy, RoomView
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.prefix_wait import PrefixWait
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
        flights: Flights,
        preemption: Preemption,
        prefix_wait: PrefixWait,
        tenants: Tenants,
        tracer: SchedulerTracer,
        policy: AdmissionPolicy,
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._preemption = preemption
        self._prefix_wait = prefix_wait
        self._tenants = tenants
        self._tracer = tracer
        self._policy = policy
        self._num_changes_announced = -1

    def admit(self, builder: PlanBuilder) -> None:
        """Fill the plan in order; the first that has to wait holds back all behind it.

        Except when it waits for something of its own tenant's, its quota or the room that is left
        for others: that is no reason for another tenant to wait. Or when it waits for a leader:
        then those behind it may pass.
        """
        if self._obstacle_to_all(builder) is StallCause.QUEUE:
            # Everybody in line waits for its turn, and that is what all were told as they came.
            return
        walk = self._roster.line.walk()
        self._admit_from(builder, walk)
        walk.close()

    def admit_ahead_of(self, builder: PlanBuilder, prefill: Sequence) -> None:
        """Let those in who come before ``prefill``, which runs, and are of other tenants."""
        line = self._roster.line
        while (sequence := line.first) is not None and sequence.share is not prefill.share:
            if line.rank_of(sequence) > line.rank_of(prefill):
                return
            is_held_back = self._obstacle_to_tenant(builder, sequence) is not None
            if is_held_back or self._obstacle_to_all(builder) is not None:
                return
            if self._prefix_wait.leader_of(builder, sequence) is not None:
                return
            if self._obstacle(builder, sequence, needs_blocks=True) is not None:
                return
            self._take(builder, sequence)

    def lack_of(self, builder: PlanBuilder, sequence: Sequence) -> tuple[int, int]:
        """Slots and blocks that ``sequence`` lacks to come in; below 0 for what is left over.

        Nothing is lacked by who waits for the quota of its tenant.
        """
        roster, capacity = self._roster, self._roster.capacity
        if self._tenants.is_resting(sequence.submission.tenant):
            return 0, 0
        num_slots = self._num_running + sequence.submission.num_running - capacity.max_num_running
        num_blocks = self._num_blocks(sequence) - builder.num_blocks_left
        return num_slots, num_blocks + (capacity.num_blocks_watermark if roster.running else 0)

    def announce_ahead(self, builder: PlanBuilder) -> None:
        """Send the tokens of those that are next, while the message stays small.

        Looks at the line only when somebody came or went since all that are next were sent.
        """
        roster, line = self._roster, self._roster.line
        if self._num_changes_announced == line.num_changes:
            return
        num_tokens_ahead = _NUM_STEPS_AHEAD * roster.capacity.token_budget
        for sequence in line.about_next(_NUM_SEQUENCES_AHEAD):
            if num_tokens_ahead <= 0:
                break
            num_tokens_ahead -= sequence.num_tokens
            if sequence.knowledge is Knowledge.UNKNOWN:
                if not builder.can_announce(sequence):
                    return
                builder.announce(sequence)
        self._num_changes_announced = line.num_changes

    def _admit_from(self, builder: PlanBuilder, walk: Walk) -> None:
        num_passed_over = 0
        while (sequence := walk.current) is not None:
            obstacle = self._obstacle_to_tenant(builder, sequence)
            if obstacle is not None:
                self._explain(builder, sequence, obstacle)
                walk.pass_tenant()
                continue
            obstacle = self._obstacle_to_all(builder)
            leader = None if obstacle else self._prefix_wait.leader_of(builder, sequence)
            obstacle = obstacle or self._obstacle(builder, sequence, needs_blocks=leader is None)
            if obstacle is not None:
                self._explain(builder, sequence, obstacle)
                return
            if leader is None:
                self._take(builder, sequence)
                continue
            if sequence.knowledge is Knowledge.UNKNOWN:
                builder.announce(sequence)
            self._explain(builder, sequence, StallCause.PREFIX_WAIT, leader)
            num_passed_over += 1
            if num_passed_over < _NUM_PASSED_OVER_MAX:
                walk.pass_sequence()
            else:
                walk.pass_tenant()

    def _obstacle_to_tenant(self, builder: PlanBuilder, sequence: Sequence) -> StallCause | None:
        """Why nobody of its tenant comes in any more, though others may."""
        roster = self._roster
        if self._tenants.is_resting(sequence.submission.tenant):
            return StallCause.QUOTA
        headroom = roster.shares.headroom(sequence.share, roster.capacity)
        if not headroom:
            return None
        max_num_running = roster.capacity.max_num_running
        if self._num_running + int(headroom * max_num_running) >= max_num_running:
            return StallCause.QUEUE
        num_blocks = int(headroom * roster.capacity.num_blocks_total)
        num_blocks_left = builder.num_blocks_left - num_blocks
        return StallCause.KV_FULL if self._num_blocks(sequence) > num_blocks_left else None

    def _obstacle_to_all(self, builder: PlanBuilder) -> StallCause | None:
        """Why nobody comes in any more."""
        if builder.num_tokens_left <= 0:
            return StallCause.TOKEN_BUDGET
        if self._num_running >= self._roster.capacity.max_num_running:
            return StallCause.QUEUE
        return StallCause.KV_FULL if builder.flight.is_short else None

    def _obstacle(
        self, builder: PlanBuilder, sequence: Sequence, *, needs_blocks: bool
    ) -> StallCause | None:
        """Why ``sequence`` does not come in, and cannot even be announced if it has to wait."""
        num_running = self._num_running + sequence.submission.num_running
        if num_running > self._roster.capacity.max_num_running:
            return StallCause.QUEUE
        if needs_blocks and not self._has_room(builder, sequence):
            return StallCause.KV_FULL
        if sequence.knowledge is Knowledge.UNKNOWN and not builder.can_announce(sequence):
            return StallCause.QUEUE
        return None

    def _has_room(self, builder: PlanBuilder, sequence: Sequence) -> bool:
        """Whether there are blocks for all its tokens, and the policy has enough left for others.

        Who would run alone is not asked for more than its own: it need not share, nor fork for all
        of its siblings.
        """
        roster, capacity = self._roster, self._roster.capacity
        if not roster.running:
            return capacity.num_blocks_peak(sequence.num_tokens) <= builder.num_blocks_left
        num_blocks_left = builder.num_blocks_left - self._num_blocks(sequence)
        if num_blocks_left < 0:
            return False
        num_blocks_known = capacity.num_blocks_peak(sequence.num_tokens)
        num_blocks_final = capacity.num_blocks_peak(sequence.num_positions_max)
        room = RoomView(
            num_blocks_total=capacity.num_blocks_total,
            num_blocks_left=num_blocks_left,
            num_blocks_more=num_blocks_final - num_blocks_known,
            num_blocks_watermark=capacity.num_blocks_watermark,
            num_blocks_growth=self._num_blocks_growth(builder),
            num_tokens_left=builder.num_tokens_left,
            num_running=len(roster.running),
            max_num_running=capacity.max_num_running,
            is_cooling=self._preemption.is_cooling(builder.flight.tick),
        )
        return self._policy.admits(roster.line.view(sequence), room)

    @property
    def _num_running(self) -> int:
        """Sequences that run, and siblings that will as soon as they can fork."""
        return len(self._roster.running) + self._roster.num_siblings_promised

    def _num_blocks(self, sequence: Sequence) -> int:
        """Blocks that its known tokens take from those left, and one for each of its siblings."""
        num_blocks = self._roster.capacity.num_blocks_peak(sequence.num_tokens)
        num_blocks -= self._num_blocks_shared(sequence)
        return num_blocks + self._num_blocks_forked(sequence)

    def _num_blocks_growth(self, builder: PlanBuilder) -> int:
        """Blocks that those who run take if each comes to its last token."""
        account = self._flights.account
        num_pinned = account.pinned - account.yieldable
        num_taken = self._roster.capacity.num_blocks_total - builder.num_blocks_left - num_pinned
        return max(0, self._roster.num_blocks_final - num_taken)

    def _num_blocks_shared(self, sequence: Sequence) -> int:
        """Blocks that it is expected to find in the hands of others.

        That may prove wrong: what was found may be cached, or in the host tier. Then the executor
        refuses the admission, and the next one is asked for only when all its blocks are there. Of
        groups with a window little is found, and nothing is counted.
        """
        if not sequence.may_share:
            return 0
        return self._roster.capacity.num_shared_blocks(sequence.num_cached_tokens)

    def _num_blocks_forked(self, sequence: Sequence) -> int:
        if sequence.sample_index:
            return 0
        submission = sequence.submission
        if submission.num_samples == 1 and submission.beams is None:
            return 0
        num_siblings = len(self._roster.request_of(sequence).siblings)
        num_siblings += submission.num_running - 1
        return num_siblings * self._roster.capacity.num_kv_groups

    def _take(self, builder: PlanBuilder, sequence: Sequence) -> None:
        roster = self._roster
        if sequence.knowledge is Knowledge.UNKNOWN:
            builder.announce(sequence)
        builder.num_blocks_left -= self._num_blocks(sequence)
        roster.admit(sequence, builder.flight.tick)
        builder.ask(sequence, builder.plan.may)
        roster.expect(sequence)

    def _explain(
        self,
        builder: PlanBuilder,
        sequence: Sequence,
        cause: StallCause,
        culprit: Sequence | None = None,
    ) -> None:
        # A preempted sequence waits because it was preempted, whatever keeps it out by now.
        if sequence.state is not SequenceState.WAITING or sequence.stalls.cause is cause:
            return
        culprit = culprit or culprit_of(sequence, cause, builder.flight, self._roster)
        self._tracer.begin_stall(sequence, cause, builder.flight.planned_ns, culprit)
