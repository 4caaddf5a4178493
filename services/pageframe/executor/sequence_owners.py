"""Whose sequences are, for as long as operations for them are kept."""

from collections import deque
from typing import NamedTuple


class SequenceOwner(NamedTuple):
    """Whose a sequence is.

    Attributes:
        tenant: The one that is charged for it.
        request_id: The caller's name for the request.
        since_ns: Since when it is known, nanoseconds since the Unix epoch.
        first_number: Operations of this sequence number before this one were for somebody else.
    """

    tenant: str
    request_id: str
    since_ns: int
    first_number: int


class SequenceOwners:
    """Owners by sequence number. Written on the thread that records; ``of`` and ``at`` on any.

    Args:
        num_ended_max: How many are known at most that have ended.
    """

    def __init__(self, num_ended_max: int) -> None:
        self._num_ended_max = num_ended_max
        self._owners: dict[int, SequenceOwner] = {}
        self._ended: deque[tuple[int, int, SequenceOwner]] = deque()

    def begin(self, sequence_id: int, owner: SequenceOwner) -> None:
        """A sequence begins."""
        self._owners[sequence_id] = owner

    def end(self, sequence_id: int, number: int) -> None:
        """A sequence has ended; ``number`` is that of the last operation until then."""
        owner = self._owners.get(sequence_id)
        if owner is not None:
            self._ended.append((number, sequence_id, owner))
            if len(self._ended) > self._num_ended_max:
                self._forget_one()

    def forget_before(self, first_number: int) -> None:
        """Operations before this one are kept no longer, nor is who had ended by then."""
        while self._ended and self._ended[0][0] < first_number:
            self._forget_one()

    def of(self, sequence_id: int) -> SequenceOwner | None:
        """Whose a sequence is or was; None when that is forgotten."""
        return self._owners.get(sequence_id)

    def at(self, sequence_id: int, number: int) -> SequenceOwner | None:
        """Whose a sequence was in one operation; None when that is forgotten, and for sequence 0.

        A number may come up again under another scheduler.
        """
        owner = self._owners.get(sequence_id)
        return None if owner is None or number < owner.first_number else owner

    def _forget_one(self) -> None:
        _, sequence_id, owner = self._ended.popleft()
        # Its number may have come up again since, after another scheduler took over.
        if self._owners.get(sequence_id) is owner:
            del self._owners[sequence_id]
