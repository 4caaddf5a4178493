"""Journals on disk: nothing is overwritten, little is lost; a full disk ends only the record."""

import dataclasses
import errno
import io
import json
from pathlib import Path

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import PreconditionError, ResourceExhaustedError
from pageframe.core.journal import Drained, Entry, Expired, Header, MemorySetup, TermsSet
from pageframe.core.replica import TenantQuota
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.core.trace import NullTraceSink
from pageframe.lab.replay import replay
from pageframe.scheduler.journal import (
    JournalFile,
    RecordingScheduler,
    options_from_json,
    options_to_json,
)
from pageframe.scheduler.options import SchedulerOptions
from pageframe.testing.fake_engine import make_facts
from pageframe.wire.journal import JournalReader, call_to_proto, encode_entry, encode_header
from unit.scheduler.driver import Driver, make_submission

S = 1_000_000_000


def record(now_ns: int, call) -> bytes:
    return encode_entry(now_ns, **call_to_proto(call))


def read(path: Path) -> list[Entry]:
    with path.open("rb") as file:
        return list(JournalReader(file))


def test_a_file_that_exists_is_left_alone(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"of a crash")
    second, third = JournalFile(path), JournalFile(path)
    assert [second.path.name, third.path.name] == ["journal.2", "journal.3"]
    second.close()
    third.close()
    assert path.read_bytes() == b"of a crash"


def test_records_are_on_disk_a_second_later_or_when_there_are_many(tmp_path):
    path = tmp_path / "journal"
    journal = JournalFile(path)
    journal.write(record(10 * S, Expired()), 10 * S)
    assert len(read(path)) == 1
    journal.write(record(10 * S + 1, Expired()), 10 * S + 1)
    assert len(read(path)) == 1
    journal.write(record(11 * S, Expired()), 11 * S)
    assert len(read(path)) == 3
    one = record(11 * S, Drained())
    for _ in range(70_000 // len(one)):
        journal.write(one, 11 * S)
    assert len(read(path)) > 3
    journal.close()
    assert len(read(path)) == 3 + 70_000 // len(one)


class FullDisk:
    def write(self, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.is_closed = True


def test_a_full_disk_ends_the_record_and_not_the_service(tmp_path):
    journal = JournalFile(tmp_path / "journal")
    journal._file.close()
    journal._file = FullDisk()
    scheduler = RecordingScheduler(
        make_facts(),
        SchedulerOptions(token_budget=16, max_num_running=4),
        trace=Driver().trace,
        clock=Driver().clock,
        journal=journal,
        memory=MemorySetup(),
    )
    for handle in range(3):
        scheduler.submit(make_submission(handle + 1), 1)
        assert scheduler.plan((handle + 2) * S) is not None or handle == 2
    journal.close()
    assert journal._file.is_closed


def test_a_disk_that_takes_less_than_all_gets_the_rest(tmp_path):
    path = tmp_path / "journal"
    journal = JournalFile(path)
    real = journal._file

    class Slow:
        def write(self, data: memoryview) -> int:
            return real.write(data[:3])

        def close(self) -> None:
            real.close()

    journal._file = Slow()
    journal.write(record(5 * S, Expired()), 5 * S)
    journal.close()
    assert [entry.now_ns for entry in read(path)] == [5 * S]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        JournalFile(tmp_path / "nowhere" / "journal")


def test_options_come_back_as_they_were_but_for_callbacks():
    options = SchedulerOptions(
        token_budget=3,
        max_num_running=4,
        target_itl_ns=5,
        lookahead=False,
        policies={"victim": "youngest"},
        tenant_weights={"a": 2.5},
        quotas=(TenantQuota(tenant="a", floor_blocks=1), TenantQuota(tenant="b", ceiling_blocks=9)),
        on_policy_fault=print,
    )
    again = options_from_json(options_to_json(options))
    assert again.on_policy_fault is not print
    assert dataclasses.replace(again, on_policy_fault=print) == options


def test_every_option_but_callbacks_is_written():
    options = SchedulerOptions(token_budget=3, max_num_running=4)
    names = {field.name for field in dataclasses.fields(options)}
    assert set(json.loads(options_to_json(options))) == names - {"on_policy_fault"}


@pytest.mark.parametrize("text", ['{"colour": 1}', "{", '{"token_budget": "many"}'])
def test_options_of_another_version_are_refused(text):
    with pytest.raises(PreconditionError) as caught:
        options_from_json(text)
    assert caught.value.reason == "JOURNAL_MALFORMED"


def test_a_header_comes_back_as_it_was():
    header = Header(
        facts=make_facts(),
        options_json="{}",
        is_traced=True,
        software="1.2",
        memory=MemorySetup(
            eviction_policy="x", session_ttl_ns=1, session_idle_ns=2, num_blocks_max=3
        ),
        settings_json='{"a": 1}',
    )
    (entry,) = JournalReader(io.BytesIO(encode_header(header, 77)))
    assert entry == Entry(77, header)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff\xff\xff\xff\x01", "no length"),
        (b"\xff\xff\xff\xff\x0f", "a length of"),
        (b"\x01\xff", "record 1"),
        (b"\x02\x08\x01", "no call"),
    ],
)
def test_what_is_no_journal_is_refused_with_the_number_of_the_record(data, message):
    with pytest.raises(PreconditionError, match=message) as caught:
        list(JournalReader(io.BytesIO(data)))
    assert caught.value.reason == "JOURNAL_MALFORMED"


def test_terms_are_recorded_and_replayed_with_the_refusals_that_they_cause(tmp_path):
    path = tmp_path / "journal"
    journal, clock = JournalFile(path), ManualClock(7 * S)
    scheduler = RecordingScheduler(
        make_facts(),
        SchedulerOptions(token_budget=16, max_num_running=4),
        trace=NullTraceSink(),
        clock=clock,
        journal=journal,
        memory=MemorySetup(),
    )
    terms = TenantTerms(
        weights={"a": 2.5},
        quotas=(TenantQuota(tenant="a", floor_blocks=1), TenantQuota(tenant="b", ceiling_blocks=9)),
        rates=(TenantRate(tenant="a", num_requests_per_minute=1, num_tokens_per_minute=500),),
    )
    scheduler.set_terms(terms, 8 * S)
    clock.advance_ns(2 * S)
    scheduler.submit(make_submission(1, max_tokens=2, tenant="a"), 1)
    with pytest.raises(ResourceExhaustedError):
        scheduler.submit(make_submission(2, max_tokens=2, tenant="a"), 1)
    assert scheduler.plan(clock.now_ns()) is not None
    journal.close()
    entries = read(path)
    assert entries[1] == Entry(8 * S, TermsSet(terms))
    assert [entry.raised for entry in entries] == ["", "", "", "RATE_LIMITED", ""]
    report = replay(iter(entries))
    assert report.is_same, report.difference
    assert report.num_steps_same == 1
    assert "quotas" in report.memory_stopped
