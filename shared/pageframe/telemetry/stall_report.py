"""Where the time of many requests went, read from their spans: by cause, by tenant, by culprit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span, join_parts

_PREFIX, _SUFFIX = names.STALL_MS.split("{}")


SpanKey = tuple[bytes, int]
"""Trace id and span id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTime:
    """The time of one request that has ended, as its caller saw it.

    ``compute_ms`` and all of ``stall_ms`` add up to ``elapsed_ms``.

    Attributes:
        trace_id: Its trace; that of its caller may hold others as well.
        span_id: Of its ``generate`` span.
        request_id: Its name; two tenants may use the same.
        tenant: Whose.
        elapsed_ms: From arrival to the last output.
        compute_ms: Tokenising, and steps that computed its tokens.
        stall_ms: Waiting by cause, ``unexplained`` among them.
        error: How it failed; empty when it did not.
    """

    trace_id: bytes
    span_id: int
    request_id: str
    tenant: str
    elapsed_ms: float
    compute_ms: float
    stall_ms: Mapping[str, float]
    error: str = ""

    @property
    def waited_ms(self) -> float:
        """Waiting over all causes."""
        return sum(self.stall_ms.values())


@dataclass(slots=True)
class CauseTotal:
    """One cause over many requests.

    Attributes:
        num_requests: How many waited for it.
        total_ms: For how long, added up.
        longest_ms: The longest of them.
        longest_request_id: Whose that was.
    """

    num_requests: int = 0
    total_ms: float = 0.0
    longest_ms: float = 0.0
    longest_request_id: str = ""

    def add(self, request: RequestTime, waited_ms: float) -> None:
        """Count one request's wait."""
        self.num_requests += 1
        self.total_ms += waited_ms
        if waited_ms > self.longest_ms:
            self.longest_ms, self.longest_request_id = waited_ms, request.request_id


class Wait(NamedTuple):
    """One wait for somebody's sake.

    Attributes:
        victim: The ``generate`` span of whoever waited.
        request_id: The victim's name; empty when its own spans are not there.
        cause: For what.
        waited_ms: How long.
    """

    victim: SpanKey
    request_id: str
    cause: str
    waited_ms: float


@dataclass(slots=True)
class Culprit:
    """A request for whose sake others waited.

    Attributes:
        request_id: Its name; empty when its own spans are not there.
        tenant: Whose.
        waits: Of its victims.
    """

    request_id: str
    tenant: str
    waits: list[Wait] = field(default_factory=list)

    @property
    def victims(self) -> set[str]:
        """Names of those who waited."""
        return {wait.request_id for wait in self.waits}

    @property
    def stall_ms(self) -> dict[str, float]:
        """How long they did, by cause."""
        totals: dict[str, float] = {}
        for wait in self.waits:
            totals[wait.cause] = totals.get(wait.cause, 0.0) + wait.waited_ms
        return totals

    @property
    def total_ms(self) -> float:
        """Waiting of all victims."""
        return sum(wait.waited_ms for wait in self.waits)


@dataclass(frozen=True, slots=True)
class StallReport:
    """Requests, and whose fault their waiting was.

    Attributes:
        requests: Those that have ended, in order of arrival.
        culprits: Worst first.
        num_unfinished: Traces with spans of sequences whose ``generate`` span is not there.
    """

    requests: list[RequestTime]
    culprits: list[Culprit]
    num_unfinished: int

    def by_cause(self) -> dict[str, CauseTotal]:
        """Totals by cause, largest first."""
        totals: dict[str, CauseTotal] = {}
        for request in self.requests:
            for cause, waited_ms in request.stall_ms.items():
                totals.setdefault(cause, CauseTotal()).add(request, waited_ms)
        return dict(sorted(totals.items(), key=lambda item: -item[1].total_ms))

    def of_tenant(self, tenant: str) -> "StallReport":
        """Only what one tenant waited for."""
        return self._only(lambda request: request.tenant == tenant)

    def of_request(self, request_id: str) -> "StallReport":
        """Only what requests of a name waited for."""
        return self._only(lambda request: request.request_id == request_id)

    def _only(self, is_kept: Callable[[RequestTime], bool]) -> "StallReport":
        kept = [request for request in self.requests if is_kept(request)]
        keys = {(request.trace_id, request.span_id) for request in kept}
        culprits = []
        for culprit in self.culprits:
            waits = [wait for wait in culprit.waits if wait.victim in keys]
            if waits:
                culprits.append(Culprit(culprit.request_id, culprit.tenant, waits))
        return StallReport(kept, _worst_first(culprits), self.num_unfinished)

    @property
    def tenants(self) -> list[str]:
        """Tenants in order of their waiting, most first."""
        waited: dict[str, float] = {}
        for request in self.requests:
            waited[request.tenant] = waited.get(request.tenant, 0.0) + request.waited_ms
        return sorted(waited, key=lambda tenant: -waited[tenant])


def stall_report(spans: Sequence[Span]) -> StallReport:
    """Read the accounts of ``generate`` spans, and the links of ``stall`` spans.

    Traces that were split are put together first.
    """
    spans = join_parts(spans)
    requests = [_request_time(span) for span in spans if span.name == names.GENERATE]
    accounted = [request for request in requests if request is not None]
    sequences = {
        (span.trace_id, span.span_id): span for span in spans if span.name == names.SEQUENCE
    }
    ended = {span.trace_id for span in spans if span.name == names.GENERATE}
    begun = {span.trace_id for span in spans if span.name in (names.STALL, names.SEQUENCE)}
    return StallReport(accounted, _culprits(spans, sequences), len(begun - ended))


def _request_time(span: Span) -> RequestTime | None:
    attributes = span.attributes
    if names.ELAPSED_MS not in attributes:
        return None
    return RequestTime(
        trace_id=span.trace_id,
        span_id=span.span_id,
        request_id=str(attributes.get(names.REQUEST_ID, "")),
        tenant=str(attributes.get(names.TENANT, "")),
        elapsed_ms=float(attributes[names.ELAPSED_MS]),
        compute_ms=float(attributes.get(names.COMPUTE_MS, 0.0)),
        stall_ms={
            key.removeprefix(_PREFIX).removesuffix(_SUFFIX): float(value)
            for key, value in attributes.items()
            if key.startswith(_PREFIX) and key.endswith(_SUFFIX)
        },
        error=span.error,
    )


def _culprits(spans: Iterable[Span], sequences: Mapping[SpanKey, Span]) -> list[Culprit]:
    culprits: dict[SpanKey, Culprit] = {}
    for span in spans:
        if span.name != names.STALL:
            continue
        for link in span.links:
            source = sequences.get(link)
            key = _request_key(source) if source else link
            culprit = culprits.setdefault(key, Culprit(_name_of(source), _tenant_of(source)))
            victim = sequences.get((span.trace_id, span.parent_span_id))
            culprit.waits.append(
                Wait(
                    _request_key(victim) if victim else (span.trace_id, 0),
                    _name_of(victim),
                    str(span.attributes.get(names.STALL_CAUSE, "")),
                    span.duration_ms,
                )
            )
    return _worst_first(culprits.values())


def _worst_first(culprits: Iterable[Culprit]) -> list[Culprit]:
    return sorted(culprits, key=lambda culprit: -culprit.total_ms)


def _request_key(sequence: Span) -> SpanKey:
    """The ``generate`` span of a sequence: all samples of a request have the same."""
    return sequence.trace_id, sequence.parent_span_id


def _name_of(sequence: Span | None) -> str:
    return str(sequence.attributes.get(names.REQUEST_ID, "")) if sequence else ""


def _tenant_of(sequence: Span | None) -> str:
    return str(sequence.attributes.get(names.TENANT, "")) if sequence else ""
