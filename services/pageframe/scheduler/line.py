"""The line in front of admission: everybody who waits to come in, for the first time or again.

Each tenant has a queue of its own, in the order of a key that is asked for once. Which tenant's
first one goes next is the order policy's ``rank``, and that changes while tenants are served:

    rank     queue of the tenant, preempted ones first
    104  b   [b7][b9]                            ◀── next
    104  a   [a1 (preempted)][a4][a5][a6] ...
    230  c   [c2][c3]

The queues stand in a heap of ranks as they were when they were last looked at. A tenant that was
served only moves back, so whoever is at the top of the heap is ranked again, and sinks if it has
to; nobody else is touched. (The same idea makes greedy maximisation lazy: Minoux, 1978.)
"""

import heapq
from collections.abc import Iterator

from pageframe.scheduler.policies.protocols import Key, OrderPolicy, TenantView, WaitingView
from pageframe.scheduler.prefixes import prefix_group
from pageframe.scheduler.queues import SequenceQueue, by_place
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.shares import Share, Shares

NEVER_NS = 1 << 62
"""Time that no request waits: a level of priority that no waiting makes up for."""

# When more tenants are served in every step, the next is the first by ranks a few steps old.
_NUM_SUNK_MAX = 16
# Entries of the heap that stand for nothing any more, before it is built anew.
_NUM_STALE_MAX = 64


class _Queue:
    """Those of one tenant.

    Attributes:
        share: The tenant's account.
        sequences: In order.
        num_passed: How many of them the walk that is under way has passed.
        entry: Number of its entry in the heap; 0 when it has none.
        num_tokens_ranked: What its tenant had been served when it was ranked.
    """

    __slots__ = ("entry", "num_passed", "num_tokens_ranked", "sequences", "share")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.sequences = SequenceQueue(by_place)
        self.num_passed = 0
        self.entry = 0
        self.num_tokens_ranked = 0


class Line:
    """All who wait, in the order of a policy.

    Args:
        order: The policy.
        shares: The tenants' accounts.
        ageing_ns: Time of waiting that is worth one level of priority, nanoseconds.

    Attributes:
        num_changes: Counts who came and went, and who has to be announced again.
        num_preempted: How many of them ran before.
    """

    def __init__(self, order: OrderPolicy, shares: Shares, *, ageing_ns: int = NEVER_NS) -> None:
        self._order = order
        self._shares = shares
        self._ageing_ns = ageing_ns
        self._queues: dict[str, _Queue] = {}
        self._heap: list[tuple[Key, int, _Queue]] = []
        self._num_entries = 0
        self._num_sequences = 0
        self.num_changes = 0
        self.num_preempted = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __contains__(self, sequence: Sequence) -> bool:
        queue = self._queues.get(sequence.submission.tenant)
        return queue is not None and sequence in queue.sequences

    def __iter__(self) -> Iterator[Sequence]:
        """All, tenant by tenant; for books and tests, not for plans."""
        for queue in self._queues.values():
            yield from queue.sequences

    @property
    def first(self) -> Sequence | None:
        """Who goes next."""
        queue = self._first()
        return None if queue is None else queue.sequences.at(queue.num_passed)

    def about_next(self, num_sequences: int) -> list[Sequence]:
        """Who goes next, about: by ranks as they were last looked at, of each tenant in turn."""
        queues = self._about_first(num_sequences)
        few: list[Sequence] = []
        for index in range(num_sequences):
            few += [queue.sequences.at(index) for queue in queues if index < len(queue.sequences)]
            if len(few) >= num_sequences:
                break
        return few[:num_sequences]

    def add(self, sequence: Sequence) -> None:
        """``sequence`` begins to wait; it is WAITING or PREEMPTED already."""
        share = sequence.share
        first = self._first()
        self._shares.wait(share, first.share if first is not None else None)
        queue = self._queues.get(share.tenant)
        if queue is None:
            queue = self._queues[share.tenant] = _Queue(share)
        is_again = sequence.state is SequenceState.PREEMPTED
        sequence.prefix_group = sequence.prefix_group or prefix_group(sequence.submission)
        sequence.view = None
        key = self._order.key(self.view(sequence))
        sequence.place = (not is_again, *key, sequence.sequence_id)
        queue.sequences.add(sequence)
        self._num_sequences += 1
        self.num_changes += 1
        self.num_preempted += is_again
        if queue.sequences.first is sequence:
            self._push(queue)

    def remove(self, sequence: Sequence) -> None:
        """``sequence`` waits no longer, wherever it stood."""
        share = sequence.share
        queue = self._queues[share.tenant]
        was_next = queue.sequences.at(queue.num_passed) is sequence
        queue.sequences.remove(sequence)
        sequence.view = None
        self._shares.stop_waiting(share)
        self._num_sequences -= 1
        self.num_changes += 1
        self.num_preempted -= not sequence.place[0]
        if not len(queue.sequences):
            queue.entry = 0
            del self._queues[share.tenant]
        elif was_next:
            self._push(queue)

    def refresh(self, share: Share) -> None:
        """A charge was taken back, so ``share`` may go earlier than it stands."""
        queue = self._queues.get(share.tenant)
        if queue is not None and queue.entry:
            self._push(queue)

    def note_change(self) -> None:
        """Somebody in line has to be announced again."""
        self.num_changes += 1

    def view(self, sequence: Sequence) -> WaitingView:
        """What policies may see of a sequence in line."""
        view = sequence.view
        # Nothing else changes while it waits.
        if view is None or view.num_cached_tokens != sequence.num_cached_tokens:
            view = sequence.view = _view(sequence, self._ageing_ns)
        return view

    def rank_of(self, sequence: Sequence) -> Key:
        """Place of ``sequence`` among all tenants, if it is the first of its own; it may run."""
        return self._rank_of(sequence, _view(sequence, self._ageing_ns))

    def _rank_of(self, sequence: Sequence, view: WaitingView) -> Key:
        share = sequence.share
        tenant = TenantView(
            tenant=share.tenant,
            weight=share.weight,
            virtual_time=share.virtual_time,
            num_running=share.num_running,
            num_waiting=share.num_waiting,
        )
        return (*self._order.rank(view, tenant), sequence.sequence_id)

    def walk(self) -> "Walk":
        """Look at one after the other from the start; close it before anybody is added."""
        return Walk(self)

    def _first(self) -> _Queue | None:
        """The queue that is next; a tenant that was served since it was ranked sinks."""
        heap, num_sunk = self._heap, 0
        while heap:
            rank, entry, queue = heap[0]
            if entry != queue.entry:
                heapq.heappop(heap)
                continue
            was_served = queue.share.num_tokens_served != queue.num_tokens_ranked
            if not was_served or len(heap) == 1 or num_sunk == _NUM_SUNK_MAX:
                return queue
            heapq.heapreplace(heap, (max(rank, self._rank(queue)), entry, queue))
            num_sunk += 1
        return None

    def _about_first(self, num_queues: int) -> list[_Queue]:
        """The first queues of the heap, without taking anything out of it."""
        heap = self._heap
        queues: list[_Queue] = []
        open_entries = [(heap[0], 0)] if heap else []
        while open_entries and len(queues) < num_queues:
            (_, entry, queue), index = heapq.heappop(open_entries)
            if entry == queue.entry:
                queues.append(queue)
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(open_entries, (heap[child], child))
        return queues

    def _push(self, queue: _Queue) -> None:
        """Give ``queue`` another entry, for the one that is its next now; if there is one."""
        queue.entry = 0
        if queue.num_passed < len(queue.sequences):
            self._num_entries += 1
            queue.entry = self._num_entries
            heapq.heappush(self._heap, (self._rank(queue), queue.entry, queue))
        if len(self._heap) > 2 * len(self._queues) + _NUM_STALE_MAX:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].entry]
            heapq.heapify(self._heap)

    def _rank(self, queue: _Queue) -> Key:
        queue.num_tokens_ranked = queue.share.num_tokens_served
        head = queue.sequences.at(queue.num_passed)
        return self._rank_of(head, self.view(head))


class Walk:
    """Goes through the line in order, while what it stands on may be taken out of it.

    A queue whose first was looked at is ranked again, by the one behind it.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._touched: dict[str, _Queue] = {}

    @property
    def current(self) -> Sequence | None:
        """Where the walk stands; None at its end."""
        return self._line.first

    def pass_sequence(self) -> None:
        """To the next; the current one stays in line."""
        queue = self._touch()
        queue.num_passed += 1
        self._line._push(queue)

    def pass_tenant(self) -> None:
        """To the next of another tenant, and to no other of this one later."""
        self._touch().entry = 0

    def close(self) -> None:
        """Everybody stands again where it stood, but for those who were taken out."""
        for queue in self._touched.values():
            queue.num_passed = 0
            self._line._push(queue)
        self._touched.clear()

    def _touch(self) -> _Queue:
        queue = self._line._first()
        assert queue is not None, "the walk is at its end"
        self._touched[queue.share.tenant] = queue
        return queue


def _view(sequence: Sequence, ageing_ns: int) -> WaitingView:
    submission = sequence.submission
    return WaitingView(
        sequence_id=sequence.sequence_id,
        tenant=submission.tenant,
        priority=submission.priority,
        submit_ns=sequence.submit_ns,
        deadline_ns=submission.deadline_ns,
        num_tokens=sequence.num_tokens,
        num_output_tokens_max=submission.sampling.max_tokens - len(sequence.output),
        num_cached_tokens=sequence.num_cached_tokens,
        num_preemptions=sequence.num_preemptions,
        turn_ns=sequence.submit_ns - submission.priority * ageing_ns,
        has_run=sequence.has_run,
        prefix_group=sequence.prefix_group,
    )
