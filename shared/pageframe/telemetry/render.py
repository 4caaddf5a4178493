"""Draws a trace as a tree of text, for a terminal and for the README."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span, spans_by_trace

_BLOCK_KEYS: Final = {
    names.KV_BLOCK_IDS: "blocks",
    names.KV_BLOCK_IDS_SOURCE: "from",
    names.KV_BLOCK_IDS_TARGET: "to",
}
# Shown in this order, under these shorter names; everything else is left to a trace viewer.
_KEYS: Final = {
    names.GEN_AI_REQUEST_MODEL: "model",
    names.GEN_AI_USAGE_INPUT_TOKENS: "prompt",
    names.GEN_AI_USAGE_OUTPUT_TOKENS: "output",
    names.STALL_CAUSE: "cause",
    names.PREEMPT_MODE: "mode",
    names.PREEMPT_VICTIM: "victim",
    names.PREEMPT_BENEFICIARY: "beneficiary",
    names.PREEMPT_ESTIMATE_MS: "estimate_ms",
    names.PREEMPT_ACTUAL_MS: "actual_ms",
    names.FINISH_REASON: "finish",
    names.KV_CAUSE: "cause",
    names.KV_STEP: "step",
    names.KV_BLOCKS_FREE_AFTER: "free_after",
    names.TRACE_NUM_DROPPED: "dropped",
}
_NUM_RANGES_SHOWN_MAX: Final = 8
_NAME_WIDTH_MIN: Final = 24


def render_trace(spans: Sequence[Span]) -> str:
    """A tree of the spans, one line each: name, start and duration in ms, what matters most.

    Spans of several traces are drawn one trace after the other. A span whose parent is not
    among ``spans`` stands at the top.
    """
    return "\n\n".join(
        _render_one(trace_id, trace) for trace_id, trace in spans_by_trace(spans).items()
    )


def _render_one(trace_id: bytes, spans: Sequence[Span]) -> str:
    known = {span.span_id for span in spans}
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    children: dict[int, list[Span]] = {}
    for span in ordered:
        parent = span.parent_span_id if span.parent_span_id in known else 0
        children.setdefault(parent, []).append(span)
    # After the roots come all spans: those not drawn by then are parents of one another.
    rows = list(_walk([*children.get(0, ()), *ordered], children))
    width = max(_NAME_WIDTH_MIN, *(len(lead + span.name) for lead, span in rows))
    origin_ns = min(span.start_ns for span in spans)
    lines = [f"trace {trace_id.hex()}"]
    for lead, span in rows:
        start_ms = (span.start_ns - origin_ns) / NANOSECONDS_PER_MILLISECOND
        times = f"{start_ms:>10.1f} ms {span.duration_ms:>10.1f} ms"
        lines.append(f"{lead + span.name:<{width}} {times}  {_facts(span)}".rstrip())
    return "\n".join(lines)


def _walk(
    roots: Sequence[Span], children: Mapping[int, Sequence[Span]]
) -> Iterator[tuple[str, Span]]:
    """Every span from the roots down, once, in drawing order, with the lines that lead to it.

    Walks with a stack of its own: a trace from outside may be deeper than Python recurses.
    """
    stack: list[tuple[str, str, Span]] = [("", "", root) for root in reversed(roots)]
    seen: set[int] = set()
    while stack:
        lead, indent, span = stack.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        yield lead, span
        turn, pipe = "└─ ", "   "
        for child in reversed(children.get(span.span_id, ())):
            stack.append((indent + turn, indent + pipe, child))
            turn, pipe = "├─ ", "│  "


def _facts(span: Span) -> str:
    attributes = span.attributes
    facts: list[str] = []
    if names.TOKENS_BEGIN in attributes and names.TOKENS_END in attributes:
        begin, end = attributes[names.TOKENS_BEGIN], attributes[names.TOKENS_END]
        facts.append(f"tokens=[{begin}, {end})")
    facts += [
        f"{short}={_number_ranges(attributes[key])}"
        for key, short in _BLOCK_KEYS.items()
        if key in attributes
    ]
    facts += [
        f"{short}={_short(attributes[key])}" for key, short in _KEYS.items() if key in attributes
    ]
    if span.error:
        facts.append(f"error={span.error!r}")
    return " ".join(facts)


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _number_ranges(numbers: Sequence[int]) -> str:
    """For example ``3,7-9 (4)``: runs of neighbours in the order given, and how many in all."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{a}-{b}" if b > a else f"{a}" for a, b in runs[:_NUM_RANGES_SHOWN_MAX]]
    if len(runs) > _NUM_RANGES_SHOWN_MAX:
        shown.append("…")
    return f"{','.join(shown)} ({len(numbers)})"
