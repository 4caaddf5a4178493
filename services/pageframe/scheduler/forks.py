"""Samples of one request: the first computes the prompt, the others fork from it.

tick          k - 1            k                        k + 1
sample 0      [chunk)          [last chunk) token       decode
samples 1..   wait             fork, token              decode: all but one copy the last block

The plan for the step in which sample 0 takes its first token carries the fork. For whom there is no
place, and who waits for a sample 0 that has its first token without having forked, goes the way of
any request: it is announced by itself, and the prefix index makes it cheap.
"""

from pageframe.core.plan import Fork
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.request import Request
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState


class Forks:
    """Forks requests when their prompts are complete."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def add_to(self, builder: PlanBuilder) -> None:
        """Fork all whose sample 0 takes its first token in the step of ``builder``."""
        for request in list(self._roster.parents.values()):
            parent = request.sequences[0]
            if self._takes_first_token(builder, parent):
                children = request.siblings[: self._num_places(builder, request)]
                if children:
                    self._fork(builder, parent, children)

    def settle(self) -> None:
        """Let those go whose sample 0 has its first token and did not fork for them."""
        for request in list(self._roster.parents.values()):
            if not request.may_fork:
                self._roster.release_siblings(request)

    def _takes_first_token(self, builder: PlanBuilder, parent: Sequence) -> bool:
        decodes, tick = self._roster.decodes, builder.flight.tick
        if parent not in decodes or not is_certain(parent, tick):
            return False
        return decodes.tick_of(parent, parent.num_prompt_tokens - 1) == tick

    def _num_places(self, builder: PlanBuilder, request: Request) -> int:
        """For how many siblings there is a place to run and a block to write to."""
        roster = self._roster
        num_running = len(roster.running) + roster.num_beams_promised
        num_running_left = roster.capacity.max_num_running - num_running
        # Its siblings' blocks are among those that the plan has set aside.
        num_copies_left = builder.num_blocks_left // roster.capacity.num_kv_groups
        num_copies_left += len(request.siblings)
        return max(0, min(num_running_left, num_copies_left))

    def _fork(self, builder: PlanBuilder, parent: Sequence, children: list[Sequence]) -> None:
        for child in children:
            self._roster.fork(parent, child, builder.flight.tick)
            child.knowledge = Knowledge.SENT
        builder.flight.forked += children
        builder.plan.forks.append(
            Fork(
                parent_id=parent.sequence_id,
                generation=parent.generation,
                child_ids=[child.sequence_id for child in children],
                sample_indices=[child.sample_index for child in children],
                span_ids=[child.span_id for child in children],
            )
        )


def is_certain(sequence: Sequence, tick: int) -> bool:
    """Whether it is known how far ``sequence`` is when the plan for ``tick`` is applied.

    An admission may find more in the prefix index than expected. Until it is answered its sequence
    may have its first token already, and a fork would come a token too late.
    """
    return sequence.state is SequenceState.RUNNING or sequence.admit_tick == tick
