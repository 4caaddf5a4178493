"""Who comes in: preempted sequences first, then new ones; and who is announced ahead of that."""

from itertools import chain

from pageframe.core.request import StallCause
from pageframe.scheduler.budget import Draft
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState
from pageframe.scheduler.tracing import SchedulerTracer

# What could be admitted in the next few steps: more would only fill the executor's memory.
_NUM_STEPS_AHEAD = 4
_NUM_SEQUENCES_AHEAD = 8


class Admission:
    """Lets sequences in as long as nothing is promised twice."""

    def __init__(self, roster: Roster, preemption: Preemption, tracer: SchedulerTracer) -> None:
        self._roster = roster
        self._preemption = preemption
        self._tracer = tracer

    def admit(self, draft: Draft) -> None:
        """Fill the draft in order; the first that has to wait holds back all behind it."""
        roster = self._roster
        for queue in (roster.preempted, roster.waiting):
            while queue:
                sequence = queue.first
                obstacle = self._obstacle(draft, sequence)
                if obstacle is not None:
                    self._explain(sequence, obstacle, draft.flight.planned_ns)
                    return
                self._take(draft, sequence)

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

    def _obstacle(self, draft: Draft, sequence: Sequence) -> StallCause | None:
        roster = self._roster
        if draft.num_tokens_left <= 0:
            return StallCause.TOKEN_BUDGET
        if len(roster.running) >= roster.capacity.max_num_running:
            return StallCause.QUEUE
        if draft.plan.victims.sequence_ids:
            return StallCause.KV_FULL
        if self._num_blocks_required(draft, sequence) > draft.num_blocks_left:
            return StallCause.KV_FULL
        if sequence.knowledge is Knowledge.UNKNOWN and not draft.can_announce(sequence):
            return StallCause.QUEUE
        return None

    def _num_blocks_required(self, draft: Draft, sequence: Sequence) -> int:
        """Blocks for all its tokens, and some more for those who run already and still grow."""
        capacity = self._roster.capacity
        if not self._roster.running:
            return capacity.num_blocks(sequence.num_tokens)
        is_cooling = self._preemption.is_cooling(draft.flight.tick)
        num_tokens = sequence.num_positions_max if is_cooling else sequence.num_tokens
        return capacity.num_blocks(num_tokens) + capacity.num_blocks_watermark

    def _take(self, draft: Draft, sequence: Sequence) -> None:
        roster = self._roster
        if sequence.knowledge is Knowledge.UNKNOWN:
            draft.announce(sequence)
        draft.num_blocks_left -= roster.capacity.num_blocks(sequence.num_tokens)
        roster.admit(sequence)
        draft.ask(sequence, draft.plan.may)
        roster.expect(sequence)

    def _explain(self, sequence: Sequence, obstacle: StallCause, at_ns: int) -> None:
        # A preempted sequence waits because it was preempted, whatever keeps it out by now.
        if sequence.state is SequenceState.WAITING:
            self._tracer.begin_stall(sequence, obstacle, at_ns)
