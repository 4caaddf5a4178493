"""Journals of simulated worlds, with all their faults, are replayed decision for decision."""

import io

import pytest

from pageframe.core.journal import ExecutorLost, MemorySetup
from pageframe.lab.replay import replay
from pageframe.lab.simulation import services
from pageframe.lab.simulation.run import simulate
from pageframe.scheduler.journal import Journal, RecordingScheduler
from pageframe.scheduler.server import make_options
from pageframe.wire.journal import JournalReader

NUM_SEEDS = 40
NUM_SEEDS_AT_ONCE = 10


class Notes(Journal):
    """A journal in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, record: bytes, now_ns: int) -> None:
        self.data += record


@pytest.fixture
def journals(monkeypatch) -> list[Notes]:
    """One for each scheduler that a simulated world starts."""
    made: list[Notes] = []

    def make_scheduler(facts, settings, trace, clock):
        made.append(Notes())
        return RecordingScheduler(
            facts,
            make_options(settings),
            trace=trace,
            clock=clock,
            journal=made[-1],
            memory=MemorySetup(),
        )

    monkeypatch.setattr(services, "make_scheduler", make_scheduler)
    return made


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, NUM_SEEDS_AT_ONCE))
def test_every_scheduler_of_every_world_is_replayed(first, journals):
    num_lost = 0
    for seed in range(first, first + NUM_SEEDS_AT_ONCE):
        journals.clear()
        assert simulate(seed).violations == []
        assert journals
        for number, notes in enumerate(journals):
            entries = list(JournalReader(io.BytesIO(bytes(notes.data))))
            num_lost += sum(isinstance(entry.call, ExecutorLost) for entry in entries)
            # Others retain, resize and set quotas there: memory is not the scheduler's alone.
            report = replay(entries, compares_memory=False)
            found = report.difference
            assert found is None, f"seed {seed}, scheduler {number}: {found.what}\n" + "\n".join(
                found.lines()
            )
            assert report.num_steps == report.num_steps_same
    assert num_lost > 0
