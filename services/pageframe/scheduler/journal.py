"""Records a scheduler: every call of its pure core, in order, and what it decided.

    loop ──▶ RecordingScheduler ──▶ Scheduler
                    │ the same calls, the same time
                    ▼
                 journal

A core is told the time of each call, and while a call lasts its clock stands still: a replay needs
one number per call. Policies of other packages are therefore not timed while a scheduler records.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import structlog
from pydantic import TypeAdapter, ValidationError

from pageframe.core.clock import Clock
from pageframe.core.errors import PreconditionError
from pageframe.core.journal import (
    Cancelled,
    CancelsTaken,
    Drained,
    ExecutorLost,
    ExecutorReady,
    Expired,
    GatewayCancelled,
    Header,
    MemorySetup,
    ResultTaken,
    SampleFinished,
    Submitted,
    TermsSet,
    reason_of,
)
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.request import Submission
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.terms import TenantTerms
from pageframe.core.trace import NullTraceSink, TraceSink
from pageframe.scheduler.core import Events, Scheduler
from pageframe.scheduler.options import SchedulerOptions
from pageframe.wire.journal import call_to_proto, encode_entry, encode_header, plan_call

_log = structlog.get_logger(__name__)

_NUM_BYTES_BUFFERED_MAX = 1 << 16
_FLUSH_INTERVAL_NS = 1_000_000_000


class Journal(Protocol):
    """Takes encoded records."""

    def write(self, record: bytes, now_ns: int) -> None:
        """Take one record, of a call at ``now_ns``; must not raise."""
        ...


class JournalFile:
    """A journal on disk. What exists is never overwritten: it may be the record of a crash.

    Records are gathered and written together, at the latest a second later if anything happens
    then. A disk that cannot be written ends the record and not the service.

    Args:
        path: Where; ``path.2``, ``path.3`` and so on if it is there already.

    Attributes:
        path: The file that was made.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        number = 1
        while True:
            self.path = path if number == 1 else path.with_name(f"{path.name}.{number}")
            try:
                self._file = self.path.open("xb", buffering=0)
                break
            except FileExistsError:
                number += 1
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._flush_ns = 0
        self._is_open = True

    def write(self, record: bytes, now_ns: int) -> None:
        """Take one record; writes only now and then."""
        if not self._is_open:
            return
        self._parts.append(record)
        self._num_bytes += len(record)
        is_due = now_ns - self._flush_ns >= _FLUSH_INTERVAL_NS
        if is_due or self._num_bytes >= _NUM_BYTES_BUFFERED_MAX:
            self._flush_ns = now_ns
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        left = memoryview(b"".join(self._parts))
        self._parts, self._num_bytes = [], 0
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._is_open = False
            _log.error("journal_ended", path=str(self.path), error=str(error))

    def close(self) -> None:
        """Write the rest."""
        if self._is_open:
            self.flush()
        self._is_open = False
        self._file.close()


class HeldClock:
    """A clock that shows the time of the call that is being made."""

    def __init__(self, now_ns: int) -> None:
        self.held_ns = now_ns

    def now_ns(self) -> int:
        """The time last set."""
        return self.held_ns


class RecordingScheduler(Scheduler):
    """A scheduler that keeps a journal.

    Args:
        facts: As of ``Scheduler``.
        options: Likewise.
        trace: Likewise.
        clock: Likewise.
        journal: Where records go.
        memory: How the executor's memory is set up.
        settings_json: Settings of the system, as JSON.
    """

    def __init__(
        self,
        facts: ReplicaFacts,
        options: SchedulerOptions,
        *,
        trace: TraceSink,
        clock: Clock,
        journal: Journal,
        memory: MemorySetup,
        settings_json: str = "",
    ) -> None:
        self._real_clock = clock
        self._held = HeldClock(clock.now_ns())
        self._journal = journal
        header = Header(
            facts=facts,
            options_json=options_to_json(options),
            is_traced=not isinstance(trace, NullTraceSink),
            software=version("pageframe"),
            memory=memory,
            settings_json=settings_json,
        )
        journal.write(encode_header(header, self._held.held_ns), self._held.held_ns)
        super().__init__(facts, options, trace=trace, clock=self._held)

    def submit(self, submission: Submission, gateway_id: int) -> None:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(self._real_clock.now_ns(), Submitted(submission, gateway_id)):
            super().submit(submission, gateway_id)

    def cancel(
        self, gateway_id: int, handle: int, reason: FinishReason = FinishReason.CANCELLED
    ) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(self._real_clock.now_ns(), Cancelled(gateway_id, handle, reason)):
            return super().cancel(gateway_id, handle, reason)

    def cancel_gateway(self, gateway_id: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(self._real_clock.now_ns(), GatewayCancelled(gateway_id)):
            return super().cancel_gateway(gateway_id)

    def finish_sample(self, gateway_id: int, handle: int, sample_index: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        call = SampleFinished(gateway_id, handle, sample_index)
        with self._recorded(self._real_clock.now_ns(), call):
            return super().finish_sample(gateway_id, handle, sample_index)

    def expire(self, now_ns: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(now_ns, Expired()):
            return super().expire(now_ns)

    def take_cancels(self) -> list[int]:
        """Do as ``Scheduler`` does, and record what was taken."""
        cancels = super().take_cancels()
        with self._recorded(self._held.held_ns, CancelsTaken(cancels)):
            return cancels

    def plan(self, now_ns: int) -> StepPlan | None:
        """Do as ``Scheduler`` does, and record the plan."""
        self._held.held_ns = now_ns
        plan, raised = None, ""
        try:
            plan = super().plan(now_ns)
        except Exception as error:
            raised = reason_of(error)
            raise
        finally:
            self._journal.write(encode_entry(now_ns, raised, plan=plan_call(plan)), now_ns)
        return plan

    def on_result(self, result: StepResult, now_ns: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(now_ns, ResultTaken(result)):
            return super().on_result(result, now_ns)

    def on_executor_lost(self, now_ns: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(now_ns, ExecutorLost()):
            return super().on_executor_lost(now_ns)

    def on_executor_ready(self, facts: ReplicaFacts, account: PoolAccount, now_ns: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(now_ns, ExecutorReady(facts, account)):
            return super().on_executor_ready(facts, account, now_ns)

    def set_terms(self, terms: TenantTerms, now_ns: int) -> Events:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(now_ns, TermsSet(terms)):
            return super().set_terms(terms, now_ns)

    def drain(self) -> None:
        """Record, and do as ``Scheduler`` does."""
        with self._recorded(self._held.held_ns, Drained()):
            super().drain()

    @contextmanager
    def _recorded(self, now_ns: int, call: Any) -> Iterator[None]:
        """Hold the clock while a call is made; what it fails with is part of the record."""
        self._held.held_ns = now_ns
        # Before the call: it may keep its arguments and change them.
        message = call_to_proto(call)
        raised = ""
        try:
            yield
        except Exception as error:
            raised = reason_of(error)
            raise
        finally:
            self._journal.write(encode_entry(now_ns, raised, **message), now_ns)


def options_to_json(options: SchedulerOptions) -> str:
    """Options as a JSON object; callbacks are left out."""
    callbacks = {field.name for field in fields(options) if callable(getattr(options, field.name))}
    return _adapter().dump_json(options, exclude=callbacks).decode()


def options_from_json(text: str) -> SchedulerOptions:
    """Options of a journal; those that it does not name have their defaults.

    Raises:
        PreconditionError: JOURNAL_MALFORMED, for options that this version does not have.
    """
    try:
        names = {field.name for field in fields(SchedulerOptions)}
        unknown = sorted(set(json.loads(text)) - names)
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        return _adapter().validate_json(text)
    except (ValueError, TypeError, ValidationError) as error:
        raise PreconditionError(
            "JOURNAL_MALFORMED", f"the options of the journal cannot be read: {error}"
        ) from None


@cache
def _adapter() -> "TypeAdapter[SchedulerOptions]":
    # Tells from the declaration how to write and read, so that no list here can fall behind.
    return TypeAdapter(SchedulerOptions)
