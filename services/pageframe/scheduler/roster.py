"""Who is where: every living sequence stands in exactly one place, and moves only through here.

state         places
WAITING       waiting, backlog
ADMITTING     running, and prefills or decodes (as if the plans in flight were applied)
RUNNING       running, and prefills or decodes (likewise)
PREEMPTED     preempted
CANCELLING    nowhere; known until the executor has released it
"""

from collections.abc import Iterator

from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.decode import DecodeSet
from pageframe.scheduler.queues import Backlog, SequenceQueue, by_arrival, by_join
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence, SequenceState


class Roster:
    """The places and the moves between them.

    Attributes:
        capacity: Bounds of every plan.
        requests: Living requests by gateway and handle.
        names: Requests by name, as long as a sample is neither ended nor being cancelled.
        sequences: By id, all that have not ended.
        waiting: Never yet run; by priority, then arrival.
        preempted: Lost their blocks; the same order.
        running: Admitted or being admitted, by id; a dict, so in the order of joining.
        prefills: Running, with tokens that no plan has asked for, in the order of joining.
        decodes: Running, one token in every step.
        backlog: Bounds of ``waiting``.
    """

    def __init__(self, capacity: Capacity, backlog: Backlog) -> None:
        self.capacity = capacity
        self.requests: dict[tuple[int, int], Request] = {}
        self.names: dict[str, Request] = {}
        self.sequences: dict[int, Sequence] = {}
        self.waiting = SequenceQueue(by_arrival)
        self.preempted = SequenceQueue(by_arrival)
        self.running: dict[int, Sequence] = {}
        self.prefills = SequenceQueue(by_join)
        self.decodes = DecodeSet(capacity.block_size)
        self.backlog = backlog
        self._num_joined = 0

    @property
    def oldest(self) -> Sequence | None:
        """The running sequence that joined first."""
        return next(iter(self.running.values()), None)

    def youngest_first(self) -> Iterator[Sequence]:
        """Running sequences but the oldest, last joined first."""
        oldest = self.oldest
        return (sequence for sequence in reversed(self.running.values()) if sequence is not oldest)

    def request_of(self, sequence: Sequence) -> Request:
        """The request that a sequence belongs to."""
        return self.requests[sequence.gateway_id, sequence.handle]

    def resize(self, capacity: Capacity) -> None:
        """Serve on with another executor; nothing may run."""
        assert not self.running, f"{len(self.running)} sequences are running"
        self.capacity = capacity
        self.decodes = DecodeSet(capacity.block_size)

    def enter(self, request: Request, sequence: Sequence) -> None:
        """A new sequence begins to wait."""
        request.num_living += 1
        self.sequences[sequence.sequence_id] = sequence
        self._wait(request, sequence)

    def admit(self, sequence: Sequence) -> None:
        """Its first entry since it began to wait is being sent."""
        self._leave_queue(sequence)
        sequence.move_to(SequenceState.ADMITTING)
        self._num_joined += 1
        sequence.join_number = self._num_joined
        self.running[sequence.sequence_id] = sequence
        self.prefills.add(sequence)

    def confirm(self, sequence: Sequence) -> None:
        """The executor has run it."""
        sequence.move_to(SequenceState.RUNNING)
        sequence.has_run = True

    def withdraw(self, sequence: Sequence) -> None:
        """The executor did not take it; it waits again where it came from."""
        self._leave_running(sequence)
        if sequence.has_run:
            sequence.move_to(SequenceState.PREEMPTED)
            self.preempted.add(sequence)
        else:
            sequence.move_to(SequenceState.WAITING)
            self._wait(self.request_of(sequence), sequence)

    def preempt(self, sequence: Sequence, generation: int) -> None:
        """It has lost its blocks."""
        self._leave_running(sequence)
        sequence.lose_blocks(generation)
        sequence.move_to(SequenceState.PREEMPTED)
        self.preempted.add(sequence)

    def expect(self, sequence: Sequence) -> None:
        """Decide between prefill and decode, as if the plans in flight were applied as asked."""
        if sequence.num_uncomputed <= 1:
            self._decode(sequence, sequence.num_planned, sequence.last_chunk_tick + 1)
        elif sequence in self.decodes:
            self.decodes.leave(sequence)
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
        self._free_name(self.request_of(sequence))

    def forget(self, sequence: Sequence) -> Request:
        """It has ended. Returns its request, which may be over now and then is forgotten too."""
        self._leave_place(sequence)
        sequence.move_to(SequenceState.ENDED)
        del self.sequences[sequence.sequence_id]
        request = self.request_of(sequence)
        request.num_living -= 1
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
        if sequence not in self.decodes:
            self.prefills.remove(sequence)
        self.decodes.join(sequence, position=position, tick=tick)

    def _wait(self, request: Request, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self.backlog.enter(request, sequence)

    def _leave_place(self, sequence: Sequence) -> None:
        if sequence.state in (SequenceState.WAITING, SequenceState.PREEMPTED):
            self._leave_queue(sequence)
        elif sequence.state in (SequenceState.ADMITTING, SequenceState.RUNNING):
            self._leave_running(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
            self.backlog.leave(self.request_of(sequence), sequence)
        else:
            self.preempted.remove(sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        del self.running[sequence.sequence_id]
        if sequence in self.decodes:
            self.decodes.leave(sequence)
        else:
            self.prefills.remove(sequence)
