"""Queues of sequences, the bound on those never admitted, and deadlines."""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from pageframe.core.errors import ResourceExhaustedError
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence

Key = tuple[int, int]


def by_arrival(sequence: Sequence) -> Key:
    """Higher priority first, then first come, first served."""
    return (-sequence.submission.priority, sequence.sequence_id)


def by_join(sequence: Sequence) -> Key:
    """First admitted first."""
    return (0, sequence.join_number)


class SequenceQueue:
    """Sequences in the order of a key that does not change while they are in it.

    A sorted list and not a heap: a cancelled sequence is taken from the middle, and the first few
    are looked at in order to announce them. Moving the tail of a list costs less than a
    microsecond per thousand entries.
    """

    def __init__(self, key: Callable[[Sequence], Key]) -> None:
        self._key = key
        self._keys: list[Key] = []
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        index = bisect_left(self._keys, self._key(sequence))
        return index < len(self._sequences) and self._sequences[index] is sequence

    @property
    def first(self) -> Sequence:
        """The head; the queue must not be empty."""
        return self._sequences[0]

    def at(self, index: int) -> Sequence:
        """The sequence behind ``index`` others."""
        return self._sequences[index]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        key = self._key(sequence)
        index = bisect_left(self._keys, key)
        assert index == len(self._keys) or self._keys[index] != key, (
            f"sequence {sequence.sequence_id} is in the queue already"
        )
        self._keys.insert(index, key)
        self._sequences.insert(index, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        index = bisect_left(self._keys, self._key(sequence))
        assert self._sequences[index] is sequence, (
            f"sequence {sequence.sequence_id} is not in the queue"
        )
        del self._keys[index]
        del self._sequences[index]


class TenantQueues:
    """Sequences in the order of a key, kept apart by tenant so that a tenant can be passed over.

    One queue would be looked through to find the first sequence of somebody else.
    """

    def __init__(self, key: Callable[[Sequence], Key]) -> None:
        self._key = key
        self._by_tenant: dict[str, SequenceQueue] = {}
        self._num_sequences = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        return heapq.merge(*self._by_tenant.values(), key=self._key)

    def __contains__(self, sequence: Sequence) -> bool:
        queue = self._by_tenant.get(sequence.submission.tenant)
        return queue is not None and sequence in queue

    def first_few(self, num_sequences: int) -> Iterator[Sequence]:
        """The first ``num_sequences`` in order."""
        return islice(self, num_sequences)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        tenant = sequence.submission.tenant
        if tenant not in self._by_tenant:
            self._by_tenant[tenant] = SequenceQueue(self._key)
        self._by_tenant[tenant].add(sequence)
        self._num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        tenant = sequence.submission.tenant
        queue = self._by_tenant[tenant]
        queue.remove(sequence)
        self._num_sequences -= 1
        if not queue:
            del self._by_tenant[tenant]

    def walk(self) -> "Walk":
        """Look at one after the other from the start; nothing is added meanwhile."""
        return Walk(self._by_tenant, self._key)


class Walk:
    """Goes through queues in order, while what it stands on may be taken out.

    Each tenant's queue has a place; the smallest key at those places is where the walk stands.
    """

    def __init__(
        self, by_tenant: Mapping[str, SequenceQueue], key: Callable[[Sequence], Key]
    ) -> None:
        self._by_tenant = dict(by_tenant)
        self._key = key
        self._places = [(key(queue.first), tenant, 0) for tenant, queue in by_tenant.items()]
        heapq.heapify(self._places)

    @property
    def current(self) -> Sequence | None:
        """Where the walk stands; None at its end."""
        if not self._places:
            return None
        _, tenant, index = self._places[0]
        return self._by_tenant[tenant].at(index)

    def go_on(self, *, is_taken: bool) -> None:
        """To the next; ``is_taken`` says that the current one has been taken out."""
        _, tenant, index = heapq.heappop(self._places)
        index += not is_taken
        queue = self._by_tenant[tenant]
        if index < len(queue):
            heapq.heappush(self._places, (self._key(queue.at(index)), tenant, index))

    def pass_tenant(self) -> None:
        """To the next of another tenant, and to no other of this one later."""
        heapq.heappop(self._places)


class Backlog:
    """Bounds what waits without ever having been admitted: requests, and their tokens."""

    def __init__(self, num_requests_max: int, num_tokens_max: int) -> None:
        self._num_requests_max = num_requests_max
        self._num_tokens_max = num_tokens_max
        self.num_requests = 0
        self.num_tokens = 0

    def check_room(self, num_tokens: int) -> None:
        """Refuse a request of ``num_tokens`` over all samples when it exceeds a bound.

        Raises:
            ResourceExhaustedError: QUEUE_FULL, naming the bound.
        """
        if self.num_requests >= self._num_requests_max:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{self.num_requests} requests are waiting; at most {self._num_requests_max} may",
                bound="requests",
                num_queued_requests=self.num_requests,
                num_queued_requests_max=self._num_requests_max,
            )
        if self.num_tokens + num_tokens > self._num_tokens_max:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{self.num_tokens} tokens are waiting and the request has {num_tokens}; "
                f"at most {self._num_tokens_max} may wait",
                bound="tokens",
                num_queued_tokens=self.num_tokens,
                num_request_tokens=num_tokens,
                num_queued_tokens_max=self._num_tokens_max,
            )

    def enter(self, request: Request, sequence: Sequence) -> None:
        """Count a sequence that begins to wait."""
        self.num_requests += request.num_waiting == 0
        request.num_waiting += 1
        self.num_tokens += sequence.num_tokens

    def leave(self, request: Request, sequence: Sequence) -> None:
        """Count a sequence that waits no longer."""
        request.num_waiting -= 1
        self.num_requests -= request.num_waiting == 0
        self.num_tokens -= sequence.num_tokens
        assert self.num_tokens >= 0, f"{self.num_tokens} tokens are waiting"


class Deadlines:
    """Requests by deadline.

    A heap from which requests that ended are not taken at once; when they are the larger part it
    is built anew, so it stays within twice the living.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._num_over = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_over

    @property
    def next_ns(self) -> int:
        """The earliest deadline; 0 when there is none."""
        self._drop_over()
        return self._heap[0][0] if self._heap else 0

    def add(self, request: Request) -> None:
        """Watch a request, if it has a deadline."""
        deadline_ns = request.submission.deadline_ns
        if deadline_ns:
            heapq.heappush(self._heap, (deadline_ns, request.serial, request))

    def forget(self, request: Request) -> None:
        """Watch a request that is over no longer."""
        if not request.submission.deadline_ns or request.has_expired:
            return
        self._num_over += 1
        if 2 * self._num_over > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapq.heapify(self._heap)
            self._num_over = 0

    def pop_expired(self, now_ns: int) -> list[Request]:
        """Living requests whose deadline has come, each once."""
        expired = []
        while self._heap and self._heap[0][0] <= now_ns:
            request = heapq.heappop(self._heap)[2]
            if request.is_over:
                self._num_over -= 1
            else:
                request.has_expired = True
                expired.append(request)
        return expired

    def _drop_over(self) -> None:
        while self._heap and self._heap[0][2].is_over:
            heapq.heappop(self._heap)
            self._num_over -= 1
