"""Identifiers and integer arithmetic.

An id names a thing, an index counts from zero, a size is a number of things: they are
different types, so that a type checker refuses to mix them.
"""

from typing import NewType

SequenceId = NewType("SequenceId", int)
"""Names one sampled sequence; given by the scheduler, never used twice in one epoch."""

BlockId = NewType("BlockId", int)
"""Names one physical block of the pool, in ``[0, num_blocks)``."""

StepNumber = NewType("StepNumber", int)
"""Running number of a step within one scheduler epoch; the first step is 1."""

NANOSECONDS_PER_MILLISECOND = 1_000_000
NANOSECONDS_PER_SECOND = 1_000_000_000


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer that is at least ``numerator / denominator``.

    Raises:
        ZeroDivisionError: if ``denominator`` is zero.
    """
    return -(-numerator // denominator)


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is a power of two; 1 is the smallest."""
    return number > 0 and number & (number - 1) == 0
