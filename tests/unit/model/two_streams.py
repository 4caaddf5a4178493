"""A device that is played: two streams, and a witness who sees who touched what before whom.

Work is done at once, in the order in which it is queued. Whether another order was possible is told
by vector clocks: each stream, and the thread that queues, counts its own work and knows how far the
others had come when it last waited for them. Two that touch the same row, one of them writing, must
know of one another; else they race, whatever came out this time (Mattern 1988; the books per row
are those of FastTrack, Flanagan and Freund 2009).
"""

import contextlib
from collections import defaultdict

import torch

THREAD = "thread"


class RaceError(Exception):
    """Two accesses of one row that nothing orders."""


class Event:
    """What a stream knew where it was recorded."""

    def __init__(self, machine, clock):
        self._machine, self.clock = machine, clock

    def synchronize(self):
        self._machine.learn(THREAD, self.clock)


class PlayedStream:
    """A ``swap_copies.Stream``; ``deaf_to`` are waits, by number, that it does not do."""

    def __init__(self, machine, name, deaf_to=()):
        self._machine, self.name, self._deaf_to = machine, name, set(deaf_to)
        self.num_waits = 0

    def record(self):
        # What the thread has seen so far it has seen before it queues anything behind the mark.
        self._machine.learn(self.name, self._machine.clock_of(THREAD))
        return Event(self._machine, dict(self._machine.clock_of(self.name)))

    def wait(self, event):
        self.num_waits += 1
        if self.num_waits - 1 not in self._deaf_to:
            self._machine.learn(self.name, event.clock)

    @contextlib.contextmanager
    def running(self):
        before, self._machine.running = self._machine.running, self.name
        yield
        self._machine.running = before


class Machine:
    """Memory by rows, and who knows what."""

    def __init__(self):
        self.running = "compute"
        self._clocks = defaultdict(dict)
        self._last_write = {}
        self._reads = defaultdict(dict)
        self.num_launches = 0

    def clock_of(self, who):
        return self._clocks[who]

    def learn(self, who, clock):
        own = self._clocks[who]
        for other, count in clock.items():
            own[other] = max(own.get(other, 0), count)

    def touch(self, reads=(), writes=(), who=None):
        """One piece of work on the running stream: rows as (name of a memory, row)."""
        who = who or self.running
        if who != THREAD:
            # It was queued after all that the thread has seen.
            self.learn(who, self._clocks[THREAD])
        clock = self._clocks[who]
        clock[who] = clock.get(who, 0) + 1
        for row in reads:
            self._check(who, "reads", row, self._last_write.get(row))
            self._reads[row][who] = clock[who]
        for row in writes:
            self._check(who, "writes", row, self._last_write.get(row))
            for other, count in self._reads.pop(row, {}).items():
                self._check(who, "writes", row, (other, count))
            self._last_write[row] = (who, clock[who])

    def _check(self, who, does, row, earlier):
        if earlier is not None and self._clocks[who].get(earlier[0], 0) < earlier[1]:
            raise RaceError(f"{who} {does} {row[0]} {row[1]} beside {earlier[0]}")


class PlayedMover:
    """A ``swap_copies.Mover`` over memory on the CPU."""

    def __init__(self, machine, memories):
        self._machine = machine
        self._names = {
            memory.untyped_storage().data_ptr(): (name, memory.shape[1])
            for name, memory in memories.items()
        }
        self.num_launches = 0
        self.sent = []

    def move_rows(self, source, source_rows, target, target_rows):
        self.num_launches += 1
        self._machine.touch(
            [self._row(source, row) for row in source_rows.tolist()],
            [self._row(target, row) for row in target_rows.tolist()],
        )
        target[torch.from_numpy(target_rows)] = source[torch.from_numpy(source_rows)]

    def send(self, source, target):
        self.sent.append(len(source))
        rows = range(len(source))
        self._machine.touch(
            [self._row(source, row) for row in rows], [self._row(target, row) for row in rows]
        )
        target.copy_(source)

    def _row(self, memory, row):
        name, num_bytes = self._names[memory.untyped_storage().data_ptr()]
        return name, memory.storage_offset() // num_bytes + row
