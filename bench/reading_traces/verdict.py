"""What must be true of a stall that was provoked: its cause, whose sake, and that times add up."""

from bench.reading_traces.provocations import Outcome
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span
from pageframe.telemetry.stall_report import stall_report

UNEXPLAINED_SHARE_MAX = 0.02
UNEXPLAINED_MS_MAX = 1.0


def faults_of(outcome: Outcome) -> list[str]:
    """One sentence for each thing that is not as it must be; empty when all is."""
    provocation = outcome.provocation
    faults = []
    if not outcome.stalls:
        faults.append(f"{provocation.victim} never waited for {provocation.cause}")
    by_id = {(span.trace_id, span.span_id): span for span in outcome.spans}
    for stall in outcome.stalls:
        culprits = [_request_of(by_id.get(link)) for link in stall.links]
        wanted = [provocation.culprit] if provocation.culprit else []
        if culprits != wanted:
            faults.append(f"the stall links to {culprits}, and must link to {wanted}")
    report = stall_report(outcome.spans)
    accounted = {entry.request_id: entry for entry in report.requests}
    if set(accounted) != {"alice", "bob"} or report.num_unfinished:
        faults.append(f"{sorted(accounted)} ended, {report.num_unfinished} did not")
        return faults
    waited_ms = accounted[provocation.victim].stall_ms.get(provocation.cause, 0.0)
    traced_ms = sum(stall.duration_ms for stall in outcome.stalls)
    if waited_ms < traced_ms - 0.01:
        faults.append(f"{traced_ms:.3f} ms are traced, and only {waited_ms:.3f} ms accounted for")
    for entry in report.requests:
        unexplained_ms = entry.stall_ms.get("unexplained", 0.0)
        if unexplained_ms > max(UNEXPLAINED_MS_MAX, UNEXPLAINED_SHARE_MAX * entry.elapsed_ms):
            faults.append(
                f"{unexplained_ms:.1f} of {entry.elapsed_ms:.1f} ms of {entry.request_id} are "
                "unexplained"
            )
        if abs(entry.compute_ms + entry.waited_ms - entry.elapsed_ms) > 0.01:
            faults.append(f"the parts of {entry.request_id}'s time do not add up")
        if entry.error:
            faults.append(f"{entry.request_id} failed: {entry.error}")
    return faults


def _request_of(span: Span | None) -> str:
    return "" if span is None else str(span.attributes.get(names.REQUEST_ID, ""))
