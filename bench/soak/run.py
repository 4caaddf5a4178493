"""Lives one memory after the other, and says how that went."""

import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.soak.audited_memory import AuditedMemory
from bench.soak.driver import Driver
from bench.soak.lives import Life, random_of, shape_of

NUM_OPERATIONS_BETWEEN_RECOUNTS = 1_000


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How a soak went.

    Attributes:
        seed: Of everything random.
        num_operations: Changes that were asked for and audited.
        num_lives: Memories that were put to the test.
        num_recounts: Times that everything was compared.
        seconds: Wall time.
        num_records: Operations on blocks that came of it, by kind.
        violation: What was wrong at last; empty when nothing was.
        life: Number of the life in which it happened; -1 for none.
        operation: Number of the operation in that life.
    """

    seed: int
    num_operations: int = 0
    num_lives: int = 0
    num_recounts: int = 0
    seconds: float = 0.0
    num_records: Counter[str] = field(default_factory=Counter)
    violation: str = ""
    life: int = -1
    operation: int = 0


def soak(
    lives: list[Life], *, seed: int, on_progress: Callable[[int], None] = lambda _: None
) -> Outcome:
    """Live these lives until something is wrong.

    Args:
        lives: Which, and for how long.
        seed: Of everything random.
        on_progress: Called now and then with the number of operations so far.
    """
    outcome, start_s = Outcome(seed=seed), time.monotonic()
    for life in lives:
        source = random_of(seed, life.number)
        memory = AuditedMemory(shape_of(life.number, source))
        try:
            _live(memory, Driver(memory, source), life, outcome, on_progress)
        except Exception:  # Whatever the memory raises is a finding, its assertions above all.
            outcome.violation = traceback.format_exc()
            outcome.life, outcome.operation = life.number, memory.num_operations
        outcome.num_records += memory.seen
        outcome.num_lives += 1
        outcome.seconds = time.monotonic() - start_s
        if outcome.violation:
            break
    return outcome


def _live(
    memory: AuditedMemory,
    driver: Driver,
    life: Life,
    outcome: Outcome,
    on_progress: Callable[[int], None],
) -> None:
    for number in range(1, life.num_operations + 1):
        driver.act()
        outcome.num_operations += 1
        if number % NUM_OPERATIONS_BETWEEN_RECOUNTS == 0:
            memory.recount()
            outcome.num_recounts += 1
            on_progress(outcome.num_operations)
    driver.end()
    memory.recount()
    memory.expect_empty()
    outcome.num_recounts += 1
    on_progress(outcome.num_operations)
