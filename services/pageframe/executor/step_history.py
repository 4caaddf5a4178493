"""The last steps, for those who watch: one short tuple each, kept in a ring.

The step thread writes, the event loop's thread reads, and neither waits for the other: a place of
the ring is replaced as a whole, together with the number of its step in the count of all.
"""

from typing import Final

from pageframe.core.step import StepResult
from pageframe.wire.memory_facts import StepFacts

NUM_STEPS_KEPT: Final = 512
"""A watcher that is further behind than this does not hear of the oldest."""


class StepHistory:
    """Steps, counted from the first that was taken; nothing is taken while nobody watches."""

    def __init__(self, num_steps_kept: int = NUM_STEPS_KEPT) -> None:
        self._ring: list[tuple[int, StepFacts] | None] = [None] * num_steps_kept
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        """How many steps there were."""
        return self._num_taken

    def take(self, result: StepResult) -> None:
        """Note a step that has ended; called on the step thread."""
        if not result.step or result.refusal:
            return
        computed, sampled = set(result.computed_ids), set(result.sampled_ids)
        num_named = sum(result.num_computed) - sum(result.first_positions)
        timing = result.timing
        facts = StepFacts(
            step=result.step,
            start_ns=timing.start_ns,
            duration_ns=timing.end_ns - timing.start_ns,
            num_sequences=len(computed | sampled),
            # Who is not named by the plan computes one token, and its drafts.
            num_tokens=num_named + len(sampled - computed) + sum(result.num_drafted),
            num_free=result.account.free,
        )
        self._ring[self._num_taken % len(self._ring)] = (self._num_taken, facts)
        self._num_taken += 1

    def read(self, num_told: int) -> tuple[list[StepFacts], int]:
        """Steps behind the first ``num_told`` that are kept, and how many there were by then.

        May be called on any thread.
        """
        num_taken = self._num_taken
        first = max(num_told, num_taken - len(self._ring))
        places = (self._ring[number % len(self._ring)] for number in range(first, num_taken))
        # One that was replaced while we read is not what we look for; it comes the next time.
        found = [
            place[1]
            for number, place in enumerate(places, start=first)
            if place is not None and place[0] == number
        ]
        return found, num_taken
