"""Where the time of many requests went, read from their spans: by cause, by tenant, by culprit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span

_PREFIX, _SUFFIX = names.STALL_MS.split("{}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTime:
    """The time of one request that has ended, as its caller saw it.

    ``compute_ms`` and all of ``stall_ms`` add up to ``elapsed_ms``.

    Attributes:
        trace_id: Its trace.
        request_id: Its name.
        tenant: Whose.
        elapsed_ms: From arrival to the last output.
        compute_ms: Tokenising, and steps that computed its tokens.
        stall_ms: Waiting by cause, ``unexplained`` among them.
        error: How it failed; empty when it did not.
    """

    trace_id: bytes
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


@dataclass(slots=True)
class Culprit:
    """A request for whose sake others waited.

    Attributes:
        request_id: Its name; empty when its own spans are not there.
        tenant: Whose.
        victims: Requests that waited.
        stall_ms: How long they did, by cause.
    """

    request_id: str
    tenant: str
    victims: set[str] = field(default_factory=set)
    stall_ms: dict[str, float] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """Waiting of all victims."""
        return sum(self.stall_ms.values())


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
        kept = [request for request in self.requests if request.tenant == tenant]
        ids = {request.request_id for request in kept}
        culprits = [culprit for culprit in self.culprits if culprit.victims & ids]
        return StallReport(kept, culprits, self.num_unfinished)

    @property
    def tenants(self) -> list[str]:
        """Tenants in order of their waiting, most first."""
        waited: dict[str, float] = {}
        for request in self.requests:
            waited[request.tenant] = waited.get(request.tenant, 0.0) + request.waited_ms
        return sorted(waited, key=lambda tenant: -waited[tenant])


def stall_report(spans: Sequence[Span]) -> StallReport:
    """Read the accounts of ``generate`` spans, and the links of ``stall`` spans."""
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


def _culprits(spans: Iterable[Span], sequences: Mapping[tuple[bytes, int], Span]) -> list[Culprit]:
    culprits: dict[bytes, Culprit] = {}
    for span in spans:
        if span.name != names.STALL:
            continue
        for trace_id, span_id in span.links:
            culprit = culprits.get(trace_id)
            if culprit is None:
                source = sequences.get((trace_id, span_id))
                attributes = source.attributes if source else {}
                culprit = culprits[trace_id] = Culprit(
                    str(attributes.get(names.REQUEST_ID, "")),
                    str(attributes.get(names.TENANT, "")),
                )
            cause = str(span.attributes.get(names.STALL_CAUSE, ""))
            culprit.stall_ms[cause] = culprit.stall_ms.get(cause, 0.0) + span.duration_ms
            victim = sequences.get((span.trace_id, span.parent_span_id))
            if victim is not None:
                culprit.victims.add(str(victim.attributes.get(names.REQUEST_ID, "")))
    return sorted(culprits.values(), key=lambda culprit: -culprit.total_ms)
