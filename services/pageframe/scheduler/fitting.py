"""Who can be served at all, at submission and again when the pool has become another one."""

from pageframe.core.errors import OutOfRangeError
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Submission
from pageframe.core.step import FinishReason
from pageframe.scheduler.endings import Endings
from pageframe.scheduler.request import check_fits, check_rows
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.tenants import Tenants


class Fitting:
    """Refuses what no state of the pool could ever hold, and ends what none can hold any more."""

    def __init__(self, roster: Roster, tenants: Tenants, endings: Endings) -> None:
        self._roster = roster
        self._tenants = tenants
        self._endings = endings
        self._misfits: list[tuple[Sequence, OutOfRangeError]] = []

    def check(self, submission: Submission, facts: ReplicaFacts) -> None:
        """Refuse a request that this replica could never serve.

        Raises:
            OutOfRangeError: CONTEXT_TOO_LONG, EXCEEDS_POOL, TOO_MANY_BEAMS or OVER_QUOTA.
        """
        check_rows(submission, self._roster.capacity.max_num_running)
        check_fits(submission, facts)
        self._tenants.check_fits(submission, facts)

    def look_again(self, facts: ReplicaFacts) -> None:
        """The pool is another one: find who does not fit now."""
        self._misfits = []
        for sequence in self._roster.sequences.values():
            try:
                self.check(sequence.submission, facts)
            except OutOfRangeError as error:
                self._misfits.append((sequence, error))

    def end_misfits(self, now_ns: int) -> None:
        """End those that do not fit, unless they run: they may still come to their end in time."""
        if not self._misfits:
            return
        misfits, self._misfits = self._misfits, []
        for sequence, error in misfits:
            if sequence.state in (SequenceState.ADMITTING, SequenceState.RUNNING):
                self._misfits.append((sequence, error))
            else:
                self._endings.cancel(sequence, FinishReason.ERROR, now_ns, error)
