"""The picture of a provoked stall: the one who waits, and below, whoever it was for."""

from bench.reading_traces.provocations import Outcome
from bench.reading_traces.waterfall import Panel, draw


def picture_of(outcome: Outcome) -> str:
    """An SVG of the victim's trace, with the culprit's below it on the same axis of time."""
    provocation = outcome.provocation
    panels = [Panel(f"{provocation.victim}, who waits", outcome.trace_of(provocation.victim))]
    if provocation.culprit:
        heading = f"{provocation.culprit}, to whom the link leads"
        panels.append(Panel(heading, outcome.trace_of(provocation.culprit)))
    return draw(provocation.title, panels, outcome.stalls)
