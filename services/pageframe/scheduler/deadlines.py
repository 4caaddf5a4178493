"""Requests that must be over by some time: watched, and given up once they cannot be.

    submit            latest start                        deadline
      [─ may wait ───────)[─ what it takes at least ───────)
                         └─ still waiting here: given up with the numbers

What a request takes at least is a bound and no estimate, so nobody is given up who could have made
it: every step is as quick as the quickest lately, all that may be found in memory is found, and
the output ends as early as it may. ``least_tokens_due`` says when that is.
"""

import heapq
from typing import NamedTuple

from pageframe.core.errors import DeadlineError
from pageframe.core.request import Delivery, Submission
from pageframe.core.step import StepResult
from pageframe.core.units import ceil_div
from pageframe.scheduler.request import Request
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState

# Steps that must have been seen before anybody is given up: the first ones may be slow.
_NUM_STEPS_KNOWN = 16
# How slowly the quickest is forgotten: after so many slower ones it has come up to 1 - 1/e of them.
_NUM_REMEMBERED = 512


class Least(NamedTuple):
    """What it takes at least to bring a sequence to its end.

    Attributes:
        num_tokens: Tokens that have to be computed before its first output token.
        num_steps: Steps in all.
        time_ns: How long that takes.
    """

    num_tokens: int
    num_steps: int
    time_ns: int


class Prospects:
    """Says what requests take at least, from the quickest steps of this executor.

    Args:
        roster: Bounds of a step.
        num_step_tokens_max: Most output tokens of a sequence in one step.
        shares_prefixes: Whether tokens may be found in memory.
    """

    def __init__(self, roster: Roster, *, num_step_tokens_max: int, shares_prefixes: bool) -> None:
        self._roster = roster
        self._num_step_tokens_max = num_step_tokens_max
        self._shares_prefixes = shares_prefixes
        self.restart()

    def restart(self) -> None:
        """Another executor: nothing is known, and nobody is given up."""
        self._num_steps = 0
        self._step_ns = self._token_ns = 0.0

    def observe(self, result: StepResult) -> None:
        """Learn from an applied step."""
        self._num_steps += 1
        step_ns = result.timing.end_ns - result.timing.start_ns
        num_tokens = sum(result.num_computed) - sum(result.first_positions)
        if num_tokens > len(result.computed_ids) and self._step_ns:
            # What the quickest step does not explain is the time of the tokens, at most.
            token_ns = max(1.0, (step_ns - self._step_ns) / num_tokens)
            self._token_ns = _quickest(self._token_ns, token_ns)
        self._step_ns = _quickest(self._step_ns, step_ns)

    def least(self, submission: Submission, sequence: Sequence | None = None) -> Least:
        """What is left of a request that does not run; ``sequence`` is its first, if it lives."""
        num_tokens = len(submission.prompt_token_ids)
        num_output = 0
        if submission.resume_token_ids:
            num_output = max(map(len, submission.resume_token_ids))
            num_tokens += min(map(len, submission.resume_token_ids))
        num_tokens -= min(num_tokens - 1, self._num_found(num_tokens, sequence))
        num_due = max(1, least_tokens_due(submission) - num_output)
        num_steps = ceil_div(num_tokens, self._roster.capacity.token_budget)
        num_steps += ceil_div(num_due - 1, self._num_step_tokens_max)
        # One token of each step is computed by the step itself.
        time_ns = num_steps * self._step_ns + max(0, num_tokens - num_steps) * self._token_ns
        if self._num_steps < _NUM_STEPS_KNOWN:
            time_ns = 0.0
        return Least(num_tokens, num_steps, int(time_ns))

    def _num_found(self, num_tokens: int, sequence: Sequence | None) -> int:
        """Most tokens that may be found in memory when it comes in."""
        if not self._shares_prefixes:
            return 0
        if sequence is None or sequence.knowledge is not Knowledge.KNOWN:
            return num_tokens
        num_led = sequence.num_leader_tokens if sequence.leader_id else 0
        return max(sequence.num_cached_tokens, num_led)


class Deadlines:
    """Requests by the time at which they have to be looked at: the latest start, then the deadline.

    A heap from which requests that ended are not taken at once; when they are the larger part it
    is built anew, so it stays within twice the living.
    """

    def __init__(self, prospects: Prospects) -> None:
        self._prospects = prospects
        self._heap: list[tuple[int, int, Request]] = []
        self._num_over = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_over

    @property
    def next_ns(self) -> int:
        """When to look next; 0 when there is nobody to look after."""
        self._drop_over()
        return self._heap[0][0] if self._heap else 0

    def check(self, submission: Submission, now_ns: int) -> None:
        """Refuse a request that cannot be over in time even if it never waits.

        Raises:
            DeadlineError: DEADLINE_UNREACHABLE.
        """
        if submission.deadline_ns:
            least = self._prospects.least(submission)
            if now_ns + least.time_ns > submission.deadline_ns:
                raise _unreachable(submission, least, now_ns)

    def add(self, request: Request, now_ns: int) -> None:
        """Watch a request, if it has a deadline; it does not run."""
        submission = request.submission
        if submission.deadline_ns:
            least = self._prospects.least(submission)
            self._watch(request, max(now_ns, submission.deadline_ns - least.time_ns))

    def forget(self, request: Request) -> None:
        """Watch a request that is over no longer."""
        if not request.submission.deadline_ns or request.has_expired:
            return
        self._num_over += 1
        if 2 * self._num_over > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapq.heapify(self._heap)
            self._num_over = 0

    def pop_expired(self, now_ns: int) -> list[tuple[Request, DeadlineError | None]]:
        """Living requests that are too late, each once; with why, if their deadline is to come."""
        expired: list[tuple[Request, DeadlineError | None]] = []
        while self._heap and self._heap[0][0] <= now_ns:
            request = heapq.heappop(self._heap)[2]
            if request.is_over:
                self._num_over -= 1
                continue
            submission = request.submission
            if submission.deadline_ns <= now_ns:
                request.has_expired = True
                expired.append((request, None))
            elif _has_begun(request):
                self._watch(request, submission.deadline_ns)
            else:
                # More may be known by now of what it takes.
                least = self._prospects.least(submission, request.sequences[0])
                latest_ns = submission.deadline_ns - least.time_ns
                if latest_ns > now_ns:
                    self._watch(request, latest_ns)
                elif latest_ns == now_ns:
                    self._watch(request, now_ns + 1)
                else:
                    request.has_expired = True
                    expired.append((request, _unreachable(submission, least, now_ns)))
        return expired

    def _watch(self, request: Request, at_ns: int) -> None:
        heapq.heappush(self._heap, (at_ns, request.serial, request))

    def _drop_over(self) -> None:
        while self._heap and self._heap[0][2].is_over:
            heapq.heappop(self._heap)
            self._num_over -= 1


def least_tokens_due(submission: Submission) -> int:
    """Fewest output tokens with which a sample may end.

    All of them when nothing but their number ends it: no end-of-sequence, no stop token, and no
    stop string, for which gateways ask for tokens in small lots. Else what must come at least.
    """
    sampling = submission.sampling
    if submission.beams is not None:
        return 1
    is_endless = sampling.ignore_eos and not sampling.stop_token_ids
    if is_endless and submission.delivery is not Delivery.COALESCED:
        return sampling.max_tokens
    return max(1, sampling.min_tokens)


def _has_begun(request: Request) -> bool:
    """Whether any of its samples runs, or ever did: what it has got is worth something."""
    waiting = (SequenceState.WAITING, SequenceState.SIBLING)
    return any(s.has_run or s.state not in waiting for s in request.sequences)


def _quickest(quickest_ns: float, ns: float) -> float:
    """The least so far, which slowly forgets; 0 stands for nothing."""
    if not quickest_ns or ns < quickest_ns:
        return ns
    return quickest_ns + (ns - quickest_ns) / _NUM_REMEMBERED


def _unreachable(submission: Submission, least: Least, now_ns: int) -> DeadlineError:
    left_ns = submission.deadline_ns - now_ns
    return DeadlineError(
        "DEADLINE_UNREACHABLE",
        f"{left_ns / 1e6:.1f} ms are left; {least.num_tokens} tokens to compute and "
        f"{least.num_steps} steps take {least.time_ns / 1e6:.1f} ms at least",
        deadline_ns=submission.deadline_ns,
        now_ns=now_ns,
        left_ns=left_ns,
        least_ns=least.time_ns,
        num_tokens=least.num_tokens,
        num_steps=least.num_steps,
    )
