"""The calls of a scheduler's pure core, as they are recorded and replayed.

The core depends on nothing but these: what it was made with, and each call with its arguments and
the time it was told. What a call decided stands beside its arguments, to be compared.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

from pageframe.core.errors import PageframeError
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.request import Submission
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.terms import TenantTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetup:
    """How KV memory was set up, beside what the executor's facts and the options tell.

    Attributes:
        eviction_policy: Which cached block went first.
        session_ttl_ns: How long the blocks of a chat were kept; 0 for not at all.
        session_idle_ns: After what time the blocks of an idle chat went to the host tier.
        num_blocks_max: Most blocks that the pool could grow to; 0 for those it had.
    """

    eviction_policy: str = "lru"
    session_ttl_ns: int = 0
    session_idle_ns: int = 0
    num_blocks_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What was recorded: the scheduler that was made, and for which executor.

    Attributes:
        facts: What the executor served.
        options_json: Options of the scheduler, as JSON.
        is_traced: Whether it wrote spans.
        software: Version of the software.
        memory: How KV memory was set up.
        settings_json: Settings of the system, as JSON; empty where it had none.
    """

    facts: ReplicaFacts
    options_json: str
    is_traced: bool
    software: str = ""
    memory: MemorySetup = field(default_factory=MemorySetup)
    settings_json: str = ""


@dataclass(frozen=True, slots=True)
class Submitted:
    """``Scheduler.submit``."""

    submission: Submission
    gateway_id: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """``Scheduler.cancel``."""

    gateway_id: int
    handle: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class GatewayCancelled:
    """``Scheduler.cancel_gateway``."""

    gateway_id: int


@dataclass(frozen=True, slots=True)
class SampleFinished:
    """``Scheduler.finish_sample``."""

    gateway_id: int
    handle: int
    sample_index: int


@dataclass(frozen=True, slots=True)
class Expired:
    """``Scheduler.expire``."""


@dataclass(frozen=True, slots=True)
class CancelsTaken:
    """``Scheduler.take_cancels``, and what it gave."""

    sequence_ids: list[int]


@dataclass(frozen=True, slots=True)
class Planned:
    """``Scheduler.plan``, and what it gave.

    Attributes:
        sha256: Of the plan; empty when there was none.
        outline: The plan as text, without the tokens of announcements.
    """

    sha256: bytes = b""
    outline: str = ""


@dataclass(frozen=True, slots=True)
class ResultTaken:
    """``Scheduler.on_result``."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class ExecutorLost:
    """``Scheduler.on_executor_lost``."""


@dataclass(frozen=True, slots=True)
class ExecutorReady:
    """``Scheduler.on_executor_ready``."""

    facts: ReplicaFacts
    account: PoolAccount


@dataclass(frozen=True, slots=True)
class TermsSet:
    """``Scheduler.set_terms``."""

    terms: TenantTerms


@dataclass(frozen=True, slots=True)
class Drained:
    """``Scheduler.drain``."""


Call: TypeAlias = (
    Header
    | Submitted
    | Cancelled
    | GatewayCancelled
    | SampleFinished
    | Expired
    | CancelsTaken
    | Planned
    | ResultTaken
    | ExecutorLost
    | ExecutorReady
    | TermsSet
    | Drained
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a journal.

    Attributes:
        now_ns: The time that the core was told.
        call: Which call, with its arguments and what it decided.
        raised: Empty, or why it failed.
    """

    now_ns: int
    call: Call
    raised: str = ""


def reason_of(error: BaseException | None) -> str:
    """What a journal says of an error."""
    if error is None:
        return ""
    return error.reason if isinstance(error, PageframeError) else type(error).__name__
