"""Calls a policy that is not trusted: whatever it does, the scheduler goes on.

An exception, an answer that makes no sense or a call that takes too long breaks a policy for good.
Pure Python cannot be stopped from outside, so time is looked at after the call: one slow call is
survived, a second one does not happen.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from pageframe.core.clock import Clock

P = TypeVar("P")
A = TypeVar("A")

CALL_NS_MAX = 1_000_000_000
"""Longest that one call may take."""
MEAN_CALL_NS_MAX = 2_000_000
"""Longest that calls may take on average."""
_NUM_CALLS_AVERAGED = 512


class PolicyFault(NamedTuple):
    """Why a policy is asked no more.

    ``group`` and ``name`` are those of its entry point; ``why`` is a sentence for a log.
    """

    group: str
    name: str
    why: str
    is_shadow: bool


class BrokenPolicyError(Exception):
    """The policy gave no answer that can be used; the message says why. Never leaves the core."""


class Guard(Generic[P]):
    """One policy and a stop watch.

    Args:
        policy: Whom to ask.
        clock: Source of time.
    """

    def __init__(self, policy: P, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._mean_ns = 0.0

    def ask(self, question: Callable[[P], A], fault_of: Callable[[A], str]) -> A:
        """The policy's answer to ``question``.

        Args:
            question: Calls one method of the policy.
            fault_of: What is wrong with an answer; empty when it may be used. It may stumble over
                an answer of a wrong type, which is a fault too.

        Raises:
            BrokenPolicyError: it must not be asked again.
        """
        start_ns = self._clock.now_ns()
        try:
            answer = question(self._policy)
            fault = fault_of(answer)
        except (Exception, SystemExit) as error:
            raise BrokenPolicyError(f"it raised {type(error).__name__}: {error}") from error
        if fault:
            raise BrokenPolicyError(f"its answer makes no sense: {fault}")
        self._check_time(self._clock.now_ns() - start_ns)
        return answer

    def _check_time(self, call_ns: int) -> None:
        if call_ns > CALL_NS_MAX:
            raise BrokenPolicyError(
                f"a call took {call_ns / 1e6:.0f} ms; at most {CALL_NS_MAX / 1e6:.0f} ms may pass"
            )
        # Counted from 0, so that a single pause of the process breaks nothing.
        self._mean_ns += (call_ns - self._mean_ns) / _NUM_CALLS_AVERAGED
        if self._mean_ns > MEAN_CALL_NS_MAX:
            raise BrokenPolicyError(
                f"calls take {self._mean_ns / 1e6:.1f} ms on average; "
                f"at most {MEAN_CALL_NS_MAX / 1e6:.0f} ms may pass"
            )
