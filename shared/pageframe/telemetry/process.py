"""Which process, exactly: a pid together with its start time, since pids are used again."""

import os
from dataclasses import dataclass
from pathlib import Path

# Fields of /proc/<pid>/stat after the command name, which may itself hold spaces and brackets.
_STATE_FIELD = 0
_START_TIME_FIELD = 19
_DEAD_STATES = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One run of one program.

    Attributes:
        pid: Process id.
        start_ticks: When it started, in clock ticks since boot; 0 for a process that was gone
            already when it was looked for.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """The process that has this pid now."""
        return cls(pid, _start_ticks(pid))

    @classmethod
    def current(cls) -> "ProcessIdentity":
        """This process."""
        return cls.of(os.getpid())

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return self.start_ticks != 0 and _start_ticks(self.pid) == self.start_ticks


def _start_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 1 :].split()
    return 0 if fields[_STATE_FIELD] in _DEAD_STATES else int(fields[_START_TIME_FIELD])
