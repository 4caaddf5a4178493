"""Who is where: every living sequence stands in exactly one place, and moves only through here.

state         places
WAITING       line, backlog
SIBLING       its request's siblings, backlog
ADMITTING     running, and prefills, decodes or steered (as if the plans in flight were applied)
RUNNING       running, and prefills, decodes or steered (likewise)
PREEMPTED     line
CANCELLING    nowhere; known until the executor has released it
"""

from collections.abc import Iterator

from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.decode import DecodeSet
from pageframe.scheduler.line import Line
from pageframe.scheduler.lockstep import Lockstep
from pageframe.scheduler.prefixes import Prefixes
from pageframe.scheduler.queues import Backlog, SequenceQueue, by_join
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.shares import Share, Shares
from pageframe.scheduler.steered import Steered

_WAITING_STATES = (SequenceState.WAITING, SequenceState.SIBLING, SequenceState.PREEMPTED)


class Roster:
    """The places and the moves between them.

    Attributes:
        capacity: Bounds of every plan.
        requests: Living requests by gateway and handle.
        names: Requests by name, as long as a sample is neither ended nor being cancelled.
        sequences: By id, all that have not ended.
        line: Never yet run, or lost all their blocks; in the order in which they come in.
        shares: What tenants were served, and hold.
        running: Admitted or being admitted, by id; a dict, so in the order of joining.
        prefills: Running, with tokens that no plan has asked for, in the order of joining.
        decodes: Running, one token in every step.
        steered: Running, a token whenever a plan asks for it; they are never in ``decodes``.
        lockstep: Those that took a token in the newest step.
        prefixes: Running, with tokens that others may want to share.
        parents: Requests with siblings whose sample 0 is running, by its id.
        backlog: Bounds of those in line that never ran, and of siblings.
        num_beams_promised: Beams of searches that run, but one of each.
        num_blocks_final: Blocks of all that run once each is at its last token, if none is shared.
        departed: Tenants of sequences that ran and are over, since somebody cleared it.
    """

    def __init__(self, capacity: Capacity, backlog: Backlog, line: Line, shares: Shares) -> None:
        self.capacity = capacity
        self.requests: dict[tuple[int, int], Request] = {}
        self.names: dict[str, Request] = {}
        self.sequences: dict[int, Sequence] = {}
        self.line = line
        self.shares = shares
        self.running: dict[int, Sequence] = {}
        self.prefills = SequenceQueue(by_join)
        self.decodes = DecodeSet(capacity.block_size, capacity.num_kv_groups)
        self.steered = Steered()
        self.lockstep = Lockstep()
        self.prefixes = Prefixes(capacity.block_size)
        self.parents: dict[int, Request] = {}
        self.backlog = backlog
        self.departed: set[str] = set()
        self.num_blocks_final = 0
        self.num_beams_promised = 0
        self._num_joined = 0

    @property
    def oldest(self) -> Sequence | None:
        """The running sequence that joined first."""
        return next(iter(self.running.values()), None)

    @property
    def shares_above(self) -> set[Share]:
        """Of tenants that take more than their part; none of one that is alone."""
        if len(self.shares) < 2:
            return set()
        return {share for share in self.shares.all if self.shares.is_above(share, self.capacity)}

    def youngest_first(self) -> Iterator[Sequence]:
        """Running sequences but the oldest, last joined first.

        Those of tenants that take more than their part go first: who sends little has joined last
        more often than not, and would pay for the growth of others.
        """
        oldest, above = self.oldest, self.shares_above
        for is_above in (True, False) if above else (False,):
            for sequence in reversed(self.running.values()):
                if sequence is not oldest and (sequence.share in above) is is_above:
                    yield sequence

    def request_of(self, sequence: Sequence) -> Request:
        """The request that a sequence belongs to."""
        return self.requests[sequence.gateway_id, sequence.handle]

    @property
    def num_siblings_promised(self) -> int:
        """Siblings that will run as soon as running sequences have computed their prompts."""
        if not self.parents:
            return self.num_beams_promised
        num_siblings = sum(len(request.siblings) for request in self.parents.values())
        return num_siblings + self.num_beams_promised

    def restart(self, capacity: Capacity) -> None:
        """Serve on with another executor; nothing may run."""
        assert not self.running, f"{len(self.running)} sequences are running"
        self.capacity = capacity
        self.decodes = DecodeSet(capacity.block_size, capacity.num_kv_groups)
        self.steered = Steered()
        self.lockstep = Lockstep()
        self.prefixes = Prefixes(capacity.block_size)

    def enter(self, request: Request, sequence: Sequence) -> None:
        """A new sequence begins to wait, in the queue or as a sibling."""
        request.num_living += 1
        sequence.share = self.shares.enter(sequence.submission.tenant)
        self.sequences[sequence.sequence_id] = sequence
        self._wait(request, sequence)

    def admit(self, sequence: Sequence, tick: int) -> None:
        """Its first entry since it began to wait is sent for ``tick``; ``expect`` follows."""
        self._leave_queue(sequence)
        self._join(sequence, tick)
        if not sequence.has_run:
            self._charge(sequence, sequence.num_tokens - sequence.num_cached_tokens)
        self.prefixes.begin(sequence)
        request = self.request_of(sequence)
        if request.siblings and request.sequences[0] is sequence:
            self.parents[sequence.sequence_id] = request

    def fork(self, parent: Sequence, child: Sequence, tick: int) -> None:
        """``child`` is to go on from ``parent``'s prompt, which is complete after ``tick``."""
        self._leave_queue(child)
        self._join(child, tick)
        num_tokens = parent.num_prompt_tokens
        for sequence in (parent, child):
            sequence.num_shared_tokens = sequence.num_given_tokens = num_tokens
        copies_block = num_tokens % self.capacity.block_size != 0
        self.decodes.join(child, position=num_tokens, tick=tick + 1, copies_block=copies_block)

    def confirm(self, sequence: Sequence, num_found: int) -> None:
        """The executor has run it, and found its first ``num_found`` tokens in memory."""
        sequence.move_to(SequenceState.RUNNING)
        if sequence.num_tokens_charged:
            num_tokens = sequence.num_tokens - num_found
            self._charge(sequence, num_tokens)
            sequence.num_tokens_charged = 0
        sequence.has_run = True

    def withdraw(self, sequence: Sequence) -> None:
        """The executor did not take it; it waits again, where it came from if that goes on."""
        self._leave_running(sequence)
        if sequence.has_run:
            sequence.move_to(SequenceState.PREEMPTED)
            self.line.add(sequence)
            return
        request = self.request_of(sequence)
        is_sibling = sequence.sample_index and request.may_fork
        sequence.move_to(SequenceState.SIBLING if is_sibling else SequenceState.WAITING)
        self._wait(request, sequence)

    def release_siblings(self, request: Request) -> None:
        """Sample 0 has not forked for them, or not for all: they go the way of any request."""
        if not request.siblings:
            return
        siblings, request.siblings = request.siblings, []
        self.parents.pop(request.sequences[0].sequence_id, None)
        for sibling in siblings:
            sibling.move_to(SequenceState.WAITING)
            self.line.add(sibling)

    def preempt(self, sequence: Sequence, generation: int, *, num_swapped: int = 0) -> None:
        """It has lost its blocks; the host tier keeps ``num_swapped`` tokens for it."""
        self._leave_running(sequence)
        sequence.lose_blocks(generation, num_swapped=num_swapped)
        sequence.move_to(SequenceState.PREEMPTED)
        self.line.add(sequence)

    def cut(self, sequence: Sequence, generation: int, num_computed: int, next_tick: int) -> None:
        """It has lost its last blocks, and catches up from ``num_computed`` on."""
        sequence.lose_tail(generation, num_computed)
        self.correct(sequence, next_tick)

    def expect(self, sequence: Sequence) -> None:
        """Decide between prefill and decode, as if the plans in flight were applied as asked."""
        num_planned = sequence.num_planned
        if sequence.num_tokens - num_planned <= 1:
            self._decode(sequence, num_planned, sequence.last_chunk_tick + 1)
        elif sequence not in self.prefills:
            self._leave_caught_up(sequence)
            self.prefills.add(sequence)

    def correct(self, sequence: Sequence, next_tick: int) -> None:
        """Decide again once a result is known; what it made untrue is put right here.

        ``next_tick`` follows the one that the result speaks of.
        """
        if sequence.is_caught_up:
            self._decode(sequence, sequence.num_computed, next_tick)
        else:
            self.expect(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants its tokens any more; the executor still has to release it."""
        self._leave_place(sequence)
        sequence.move_to(SequenceState.CANCELLING)
        request = self.request_of(sequence)
        if not request.may_fork:
            self.release_siblings(request)
        self._free_name(request)

    def forget(self, sequence: Sequence) -> Request:
        """It has ended. Returns its request, which may be over now and then is forgotten too."""
        self._leave_place(sequence)
        sequence.move_to(SequenceState.ENDED)
        del self.sequences[sequence.sequence_id]
        self.shares.exit(sequence.share)
        request = self.request_of(sequence)
        request.num_living -= 1
        if not request.may_fork:
            self.release_siblings(request)
        self._free_name(request)
        if request.is_over:
            del self.requests[sequence.gateway_id, sequence.handle]
        return request

    def _free_name(self, request: Request) -> None:
        # Another request may bear the name by now, if this one took long to be released.
        name = request.submission.request_id
        if self.names.get(name) is request and not request.is_wanted:
            del self.names[name]

    def _decode(self, sequence: Sequence, position: int, tick: int) -> None:
        if sequence in self.prefills:
            self.prefills.remove(sequence)
        if sequence.is_steered:
            self.steered.join(sequence)
        else:
            self.decodes.join(sequence, position=position, tick=tick)

    def _leave_caught_up(self, sequence: Sequence) -> None:
        """It need not have caught up, if it has just been admitted."""
        if sequence in self.decodes:
            self.decodes.leave(sequence)
        elif sequence in self.steered:
            self.steered.leave(sequence)

    def _join(self, sequence: Sequence, tick: int) -> None:
        sequence.move_to(SequenceState.ADMITTING)
        sequence.admit_tick = tick
        self._num_joined += 1
        sequence.join_number = self._num_joined
        self.running[sequence.sequence_id] = sequence
        self.num_beams_promised += sequence.submission.num_running - 1
        self.shares.join(sequence.share, sequence.num_tokens)
        self.num_blocks_final += self.capacity.num_blocks_peak(sequence.num_positions_max)

    def _charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge its tenant for its first tokens, in place of what was charged for them before."""
        sequence.share.num_prompt_tokens += num_tokens - sequence.num_tokens_charged
        if num_tokens < sequence.num_tokens_charged:
            self.line.refresh(sequence.share)
        sequence.num_tokens_charged = num_tokens

    def _wait(self, request: Request, sequence: Sequence) -> None:
        if sequence.state is SequenceState.SIBLING:
            request.siblings.append(sequence)
            request.siblings.sort(key=lambda sibling: sibling.sample_index)
            parent = request.sequences[0]
            if parent.sequence_id in self.running:
                self.parents[parent.sequence_id] = request
        else:
            self.line.add(sequence)
        self.backlog.enter(request, sequence)

    def _leave_place(self, sequence: Sequence) -> None:
        if sequence.state in _WAITING_STATES:
            self._leave_queue(sequence)
        elif sequence.state in (SequenceState.ADMITTING, SequenceState.RUNNING):
            self._leave_running(sequence)
            self.departed.add(sequence.submission.tenant)

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.PREEMPTED:
            self.line.remove(sequence)
            return
        request = self.request_of(sequence)
        if sequence.state is SequenceState.SIBLING:
            request.siblings.remove(sequence)
            if not request.siblings:
                self.parents.pop(request.sequences[0].sequence_id, None)
        else:
            self.line.remove(sequence)
        self.backlog.leave(request, sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        del self.running[sequence.sequence_id]
        self.lockstep.leave(sequence)
        self.num_beams_promised -= sequence.submission.num_running - 1
        self.shares.leave(sequence.share, sequence.num_tokens)
        self.num_blocks_final -= self.capacity.num_blocks_peak(sequence.num_positions_max)
        if not sequence.has_run:
            # It was never confirmed, so nothing was computed.
            self._charge(sequence, 0)
        self.parents.pop(sequence.sequence_id, None)
        self.prefixes.end(sequence)
        if sequence in self.prefills:
            self.prefills.remove(sequence)
        else:
            self._leave_caught_up(sequence)
