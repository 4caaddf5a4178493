"""Replays a recorded scheduler: the same calls at the same times must give the same plans.

journal ─▶ the calls ─▶ a fresh Scheduler ─▶ plans ─▶ a fresh StepEngine
│                                │            │
└── what was decided ──── compared with ──────┘
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pageframe.core.clock import Clock
from pageframe.core.errors import PreconditionError
from pageframe.core.journal import (
    Call,
    Cancelled,
    CancelsTaken,
    Drained,
    Entry,
    ExecutorLost,
    ExecutorReady,
    Expired,
    GatewayCancelled,
    Header,
    Planned,
    ResultTaken,
    SampleFinished,
    Submitted,
    TermsSet,
    reason_of,
)
from pageframe.core.plan import StepPlan
from pageframe.core.trace import NullTraceSink, QuietTraceSink, TraceSink
from pageframe.lab.replay_memory import MemoryReplay
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.journal import HeldClock, options_from_json
from pageframe.scheduler.options import SchedulerOptions
from pageframe.wire.journal import planned

MakeScheduler = Callable[[Header, SchedulerOptions, TraceSink, Clock], Scheduler]
OnPlan = Callable[[StepPlan], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place where the replay did something else.

    Attributes:
        record: Number of the record in the journal, from 1.
        step: The step that was planned last, or was being planned.
        what: What differs: ``plan``, ``cancels``, ``failure`` or ``result``.
        recorded: As it was, as text.
        replayed: As it is now.
    """

    record: int
    step: int
    what: str
    recorded: str
    replayed: str

    def lines(self) -> list[str]:
        """The two, line by line: ``-`` as recorded, ``+`` as replayed."""
        return list(
            difflib.unified_diff(
                self.recorded.splitlines(),
                self.replayed.splitlines(),
                "recorded",
                "replayed",
                lineterm="",
                n=2,
            )
        )


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        num_records: Records of the journal that were read.
        num_requests: Requests that were taken in.
        num_steps: Plans that the journal has.
        num_steps_same: Plans that were the same, up to the first difference.
        num_results: Results of KV memory that were compared.
        num_results_same: Results that were the same.
        memory_stopped: Empty, or why KV memory was not compared to the end.
        difference: The first one, if there is any.
    """

    num_records: int = 0
    num_requests: int = 0
    num_steps: int = 0
    num_steps_same: int = 0
    num_results: int = 0
    num_results_same: int = 0
    memory_stopped: str = ""
    difference: Difference | None = None

    @property
    def is_same(self) -> bool:
        """Whether every decision was the same."""
        return self.difference is None


class Replay:
    """Replays one journal.

    Args:
        header: Its first record.
        now_ns: The time of that record.
        make_scheduler: Builds the core that is to be tried; by default the real one.
        on_plan: Is handed every plan that the replay makes.
        compares_memory: Whether KV memory is replayed too.
    """

    def __init__(
        self,
        header: Header,
        now_ns: int,
        *,
        make_scheduler: MakeScheduler | None = None,
        on_plan: OnPlan | None = None,
        compares_memory: bool = True,
    ) -> None:
        options = options_from_json(header.options_json)
        self._clock = HeldClock(now_ns)
        self._on_plan = on_plan
        # Span ids are part of announcements, and only a scheduler that traces makes them.
        trace: TraceSink = QuietTraceSink() if header.is_traced else NullTraceSink()
        make = make_scheduler or _make_scheduler
        self._scheduler = make(header, options, trace, self._clock)
        self._memory = MemoryReplay(header, options)
        if not compares_memory:
            self._memory.stopped = "nobody asked for it"
        self._step = 0
        self._is_astray = False
        self.report = ReplayReport(num_records=1)

    def feed(self, entry: Entry) -> None:
        """Make one call, and compare; after another decision only count."""
        report = self.report
        report.num_records += 1
        if isinstance(entry.call, Planned) and entry.call.sha256:
            report.num_steps += 1
        if self._is_astray:
            return
        self._clock.held_ns = entry.now_ns
        raised = ""
        decided: Call | None = None
        try:
            decided = self._make(entry)
        except Exception as error:
            raised = reason_of(error)
        if raised != entry.raised:
            self._differ("failure", entry.raised or "none", raised or "none")
        elif not raised and isinstance(entry.call, Planned):
            self._compare_plans(entry.call, decided)
        elif isinstance(entry.call, CancelsTaken) and decided != entry.call:
            self._differ("cancels", str(entry.call), str(decided))
        if isinstance(entry.call, Submitted) and not raised:
            report.num_requests += 1

    def close(self) -> ReplayReport:
        """What was found."""
        report, memory = self.report, self._memory
        report.num_results, report.num_results_same = memory.num_results, memory.num_same
        report.memory_stopped = memory.stopped
        memory.close()
        return report

    def _make(self, entry: Entry) -> Call | None:
        scheduler, now_ns = self._scheduler, entry.now_ns
        match entry.call:
            case Submitted(submission, gateway_id):
                scheduler.submit(submission, gateway_id)
            case Cancelled(gateway_id, handle, reason):
                scheduler.cancel(gateway_id, handle, reason)
            case GatewayCancelled(gateway_id):
                scheduler.cancel_gateway(gateway_id)
            case SampleFinished(gateway_id, handle, sample_index):
                scheduler.finish_sample(gateway_id, handle, sample_index)
            case Expired():
                scheduler.expire(now_ns)
            case CancelsTaken():
                return CancelsTaken(scheduler.take_cancels())
            case Planned():
                return self._plan(now_ns)
            case ResultTaken(result):
                self._memory.on_result(result, now_ns)
                if self._memory.difference is not None:
                    self._differ("result", *self._memory.difference)
                scheduler.on_result(result, now_ns)
            case ExecutorLost():
                self._memory.on_lost()
                scheduler.on_executor_lost(now_ns)
            case ExecutorReady(facts, account):
                self._memory.on_ready(facts, account, now_ns)
                scheduler.on_executor_ready(facts, account, now_ns)
            case TermsSet(terms):
                self._memory.on_quotas(terms.quotas)
                scheduler.set_terms(terms, now_ns)
            case Drained():
                scheduler.drain()
            case Header():
                raise PreconditionError("JOURNAL_MALFORMED", "a journal has a second header")
        return None

    def _plan(self, now_ns: int) -> Planned:
        plan = self._scheduler.plan(now_ns)
        if plan is not None:
            self._step = plan.step
            self._memory.on_plan(plan)
            if self._on_plan is not None:
                self._on_plan(plan)
        return planned(plan)

    def _compare_plans(self, recorded: Planned, decided: Call | None) -> None:
        assert isinstance(decided, Planned), f"a plan was asked for and {decided} came"
        if recorded.sha256 == decided.sha256:
            self.report.num_steps_same += bool(recorded.sha256)
        else:
            self._differ("plan", recorded.outline or "no plan", decided.outline or "no plan")

    def _differ(self, what: str, recorded: str, replayed: str) -> None:
        # A scheduler that decides otherwise is fed with answers to questions that it did not ask.
        # Other results of KV memory do not matter to it: it goes on from the recorded ones.
        self._is_astray = self._is_astray or what != "result"
        if self.report.difference is None:
            self.report.difference = Difference(
                record=self.report.num_records,
                step=self._step,
                what=what,
                recorded=recorded,
                replayed=replayed,
            )


def replay(
    entries: Iterable[Entry],
    *,
    make_scheduler: MakeScheduler | None = None,
    compares_memory: bool = True,
    on_entry: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Replay a whole journal.

    Args:
        entries: The journal, header first.
        make_scheduler: See ``Replay``.
        compares_memory: Likewise.
        on_entry: Told the number of records so far, after each.

    Raises:
        PreconditionError: JOURNAL_MALFORMED, also for one without a header.
    """
    running: Replay | None = None
    for entry in entries:
        if running is None:
            running = begin(entry, make_scheduler=make_scheduler, compares_memory=compares_memory)
        else:
            running.feed(entry)
        if on_entry is not None:
            on_entry(running.report.num_records)
    if running is None:
        raise PreconditionError("JOURNAL_MALFORMED", "the journal is empty")
    return running.close()


def begin(
    entry: Entry,
    *,
    make_scheduler: MakeScheduler | None = None,
    on_plan: OnPlan | None = None,
    compares_memory: bool = True,
) -> Replay:
    """Begin with the first record.

    Raises:
        PreconditionError: JOURNAL_MALFORMED, if it is no header.
    """
    if not isinstance(entry.call, Header):
        raise PreconditionError("JOURNAL_MALFORMED", "the journal does not begin with a header")
    return Replay(
        entry.call,
        entry.now_ns,
        make_scheduler=make_scheduler,
        on_plan=on_plan,
        compares_memory=compares_memory,
    )


def _make_scheduler(
    header: Header, options: SchedulerOptions, trace: TraceSink, clock: Clock
) -> Scheduler:
    return Scheduler(header.facts, options, trace=trace, clock=clock)
