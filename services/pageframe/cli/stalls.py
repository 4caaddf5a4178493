"""``pageframe stalls``: where the time of requests went, read from an exported trace."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pageframe.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from pageframe.core.errors import NotFoundError
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span, join_parts, read_spans
from pageframe.telemetry.stall_report import RequestTime, StallReport, stall_report

_COMPUTE = "(compute)"


def stalls(
    files: Annotated[list[Path], typer.Argument(help="Trace files, or folders of them.")],
    tenant: Annotated[str | None, typer.Option(help="Only requests of this tenant.")] = None,
    request: Annotated[str | None, typer.Option(help="Show the waits of this request.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of requests and culprits.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Where the time went, by cause, by tenant and by culprit.

    Exit code 1 when the files tell of no finished request.
    """
    spans = join_parts([span for file in files for span in read_spans(file)])
    report = stall_report(spans)
    if tenant is not None:
        report = report.of_tenant(tenant)
    if request is not None:
        report = _only(report, request)
    if as_json:
        json.dump(_to_json(report, top), sys.stdout, ensure_ascii=False)
        print()
    else:
        _print(Console(), report, spans if request is not None else [], top)
    raise typer.Exit(EXIT_OK if report.requests else EXIT_FAILURE)


def _only(report: StallReport, request_id: str) -> StallReport:
    kept = report.of_request(request_id)
    if not kept.requests:
        raise NotFoundError(
            "REQUEST_NOT_FOUND",
            f"no finished request {request_id!r} among the {len(report.requests)} of this trace",
            num_requests=len(report.requests),
        )
    return kept


def _print(console: Console, report: StallReport, spans: list[Span], top: int) -> None:
    requests = report.requests
    elapsed_ms = sum(entry.elapsed_ms for entry in requests)
    waited_ms = sum(entry.waited_ms for entry in requests)
    share = waited_ms / elapsed_ms if elapsed_ms else 0.0
    console.print(
        f"{len(requests)} requests, {elapsed_ms / 1e3:,.3f} s in all, {share:.1%} of it waiting"
        + (f"; {report.num_unfinished} more have not ended" if report.num_unfinished else "")
    )
    if not requests:
        return
    console.print(_causes(report, elapsed_ms))
    if len(report.tenants) > 1:
        console.print(_tenants(report))
    if spans:
        console.print(_waits(spans, requests[0]))
    elif len(requests) > 1:
        console.print(_slowest(report, top))
    if report.culprits:
        console.print(_culprits(report, top))


def _causes(report: StallReport, elapsed_ms: float) -> Table:
    table = Table("cause", title="By cause", title_justify="left", box=None)
    for heading in ("time", "share", "requests", "longest"):
        table.add_column(heading, justify="right")
    table.add_column("of request")
    compute_ms = sum(entry.compute_ms for entry in report.requests)
    rows: list[tuple[str, float, int, float, str]] = [
        (cause, total.total_ms, total.num_requests, total.longest_ms, total.longest_request_id)
        for cause, total in report.by_cause().items()
    ]
    worst = max(report.requests, key=lambda entry: entry.compute_ms)
    rows.append((_COMPUTE, compute_ms, len(report.requests), worst.compute_ms, worst.request_id))
    for cause, total_ms, num_requests, longest_ms, request_id in rows:
        part = total_ms / elapsed_ms if elapsed_ms else 0.0
        cells = (_ms(total_ms), f"{part:.1%}", str(num_requests), _ms(longest_ms), request_id)
        table.add_row(cause, *cells)
    return table


def _tenants(report: StallReport) -> Table:
    table = Table("tenant", title="By tenant", title_justify="left", box=None)
    for heading in ("requests", "elapsed", "waiting"):
        table.add_column(heading, justify="right")
    table.add_column("most for")
    for tenant in report.tenants:
        part = report.of_tenant(tenant)
        causes = part.by_cause()
        elapsed_ms = sum(entry.elapsed_ms for entry in part.requests)
        waited_ms = sum(entry.waited_ms for entry in part.requests)
        most = next(iter(causes), "")
        table.add_row(tenant or "-", str(len(part.requests)), _ms(elapsed_ms), _ms(waited_ms), most)
    return table


def _slowest(report: StallReport, top: int) -> Table:
    table = Table("request", title="Waited longest", title_justify="left", box=None)
    for heading in ("elapsed", "waiting"):
        table.add_column(heading, justify="right")
    table.add_column("for")
    for entry in sorted(report.requests, key=lambda entry: -entry.waited_ms)[:top]:
        table.add_row(
            entry.request_id, _ms(entry.elapsed_ms), _ms(entry.waited_ms), _parts(entry.stall_ms)
        )
    return table


def _culprits(report: StallReport, top: int) -> Table:
    table = Table("request", "tenant", title="For whose sake", title_justify="left", box=None)
    for heading in ("victims", "they waited"):
        table.add_column(heading, justify="right")
    table.add_column("for")
    for culprit in report.culprits[:top]:
        table.add_row(
            culprit.request_id or "(not in this trace)",
            culprit.tenant,
            str(len(culprit.victims)),
            _ms(culprit.total_ms),
            _parts(culprit.stall_ms),
        )
    return table


def _waits(spans: list[Span], request: RequestTime) -> Table:
    """The waits of one request, one after the other."""
    table = Table("at", "cause", title="One by one", title_justify="left", box=None)
    table.add_column("time", justify="right")
    table.add_column("culprit")
    by_id = {(span.trace_id, span.span_id): span for span in spans}
    start_ns = by_id[request.trace_id, request.span_id].start_ns
    for span in spans:
        if span.name != names.STALL or span.trace_id != request.trace_id:
            continue
        sequence = by_id.get((span.trace_id, span.parent_span_id))
        if sequence is None or sequence.parent_span_id != request.span_id:
            continue
        sources = [by_id.get(link) for link in span.links]
        culprits = [
            str(source.attributes.get(names.REQUEST_ID, "")) for source in sources if source
        ]
        table.add_row(
            f"+{_ms((span.start_ns - start_ns) / 1e6)}",
            str(span.attributes.get(names.STALL_CAUSE, "")),
            _ms(span.duration_ms),
            ", ".join(culprits),
        )
    return table


def _parts(stall_ms: Any) -> str:
    ordered = sorted(stall_ms.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {_ms(waited_ms)}" for cause, waited_ms in ordered[:3])


def _ms(value: float) -> str:
    return f"{value:,.1f} ms"


def _to_json(report: StallReport, top: int) -> dict[str, Any]:
    return {
        "num_requests": len(report.requests),
        "num_unfinished": report.num_unfinished,
        "elapsed_ms": sum(entry.elapsed_ms for entry in report.requests),
        "compute_ms": sum(entry.compute_ms for entry in report.requests),
        "causes": {cause: asdict(total) for cause, total in report.by_cause().items()},
        "tenants": {
            tenant: {
                cause: total.total_ms
                for cause, total in report.of_tenant(tenant).by_cause().items()
            }
            for tenant in report.tenants
        },
        "requests": [
            {
                **asdict(entry),
                "trace_id": entry.trace_id.hex(),
                "span_id": f"{entry.span_id:016x}",
                "stall_ms": dict(entry.stall_ms),
            }
            for entry in report.requests
        ],
        "culprits": [
            {
                "request_id": culprit.request_id,
                "tenant": culprit.tenant,
                "num_victims": len(culprit.victims),
                "stall_ms": culprit.stall_ms,
            }
            for culprit in report.culprits[:top]
        ],
    }
