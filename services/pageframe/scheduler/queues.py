"""Queues of sequences, and the bound on those never admitted."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from pageframe.core.errors import ResourceExhaustedError
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence

Key = tuple[int, ...]


def by_place(sequence: Sequence) -> Key:
    """As the order policy said when it began to wait; see ``line``."""
    return sequence.place


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


# Part of a bound by which a tenant passes it that has less than this part waiting.
_SPARE_DIVISOR = 16


class Backlog:
    """Bounds what waits without ever having been admitted: requests, and their tokens.

    One tenant may fill it all, and another still finds a place: who has less than a sixteenth of a
    bound waiting may pass it by a sixteenth.

        [───────────── anybody ─────────────)[─ who has little waiting ─)
        0                                 bound                  bound * 17/16

    Args:
        num_requests_max: Bound of requests.
        num_tokens_max: Bound of their tokens, over all samples.
    """

    def __init__(self, num_requests_max: int, num_tokens_max: int) -> None:
        self._num_requests_max = num_requests_max
        self._num_tokens_max = num_tokens_max
        self._num_requests_of: Counter[str] = Counter()
        self._num_tokens_of: Counter[str] = Counter()
        self.num_requests = 0
        self.num_tokens = 0

    def check_room(self, tenant: str, num_tokens: int) -> None:
        """Refuse a request of ``num_tokens`` over all samples when it exceeds a bound.

        Raises:
            ResourceExhaustedError: QUEUE_FULL, naming the bound.
        """
        num_requests_max = _bound(self._num_requests_max, self._num_requests_of[tenant] + 1)
        if self.num_requests >= num_requests_max:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{self.num_requests} requests are waiting, {self._num_requests_of[tenant]} of "
                f"them of this tenant; at most {num_requests_max} may",
                bound="requests",
                num_queued_requests=self.num_requests,
                num_queued_requests_of_tenant=self._num_requests_of[tenant],
                num_queued_requests_max=num_requests_max,
            )
        num_tokens_max = _bound(self._num_tokens_max, self._num_tokens_of[tenant] + num_tokens)
        if self.num_tokens + num_tokens > num_tokens_max:
            raise ResourceExhaustedError(
                "QUEUE_FULL",
                f"{self.num_tokens} tokens are waiting, {self._num_tokens_of[tenant]} of them of "
                f"this tenant, and the request has {num_tokens}; at most {num_tokens_max} may wait",
                bound="tokens",
                num_queued_tokens=self.num_tokens,
                num_queued_tokens_of_tenant=self._num_tokens_of[tenant],
                num_request_tokens=num_tokens,
                num_queued_tokens_max=num_tokens_max,
            )

    def enter(self, request: Request, sequence: Sequence) -> None:
        """Count a sequence that begins to wait."""
        self._count(sequence, int(request.num_waiting == 0), sequence.num_tokens)
        request.num_waiting += 1

    def leave(self, request: Request, sequence: Sequence) -> None:
        """Count a sequence that waits no longer."""
        request.num_waiting -= 1
        self._count(sequence, -int(request.num_waiting == 0), -sequence.num_tokens)
        assert self.num_tokens >= 0, f"{self.num_tokens} tokens are waiting"

    def _count(self, sequence: Sequence, num_requests: int, num_tokens: int) -> None:
        tenant = sequence.submission.tenant
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self._num_requests_of[tenant] += num_requests
        self._num_tokens_of[tenant] += num_tokens
        if not self._num_requests_of[tenant]:
            del self._num_requests_of[tenant], self._num_tokens_of[tenant]


def _bound(num_max: int, num_own: int) -> int:
    """The bound for a tenant that would have ``num_own`` waiting."""
    num_spare = max(1, num_max // _SPARE_DIVISOR)
    return num_max + num_spare if num_own <= num_spare else num_max
