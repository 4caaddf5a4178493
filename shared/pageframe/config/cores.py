"""Who gets a core where there are more busy threads than cores: those that compute.

A thread of the kernels that loses its core in the midst of a task keeps the others waiting, who
have the rest of the step done long before. A service that wakes up for a message can wait instead,
for the next moment in which a thread of the kernels has nothing to do: these offer their cores
then (``kernels/cpu/csrc/futex.cpp``). Linux's name for it is the batch policy: such a thread never
takes a core from one that runs, and is otherwise treated as any other. Niceness is left as it is,
and so is a policy that somebody chose for the whole process.
"""

import contextlib
import os


def give_way() -> None:
    """Have the calling thread, and those that it starts from now on, wait until a core is offered.

    Does nothing where the system has no such policy, or refuses.
    """
    if hasattr(os, "SCHED_BATCH"):
        _change_policy(os.SCHED_OTHER, os.SCHED_BATCH)


def go_first() -> None:
    """Undo ``give_way`` for the calling thread, and those that it starts from now on."""
    if hasattr(os, "SCHED_BATCH"):
        _change_policy(os.SCHED_BATCH, os.SCHED_OTHER)


def _change_policy(before: int, after: int) -> None:
    # A sandbox may forbid either call; then threads share cores as before.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == before:
            os.sched_setscheduler(0, after, os.sched_param(0))
