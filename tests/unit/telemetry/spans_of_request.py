"""What an encoded request says, as tests want to see it."""

import json

from pageframe.telemetry.reader import Span, spans_of


def spans_in(request: bytes) -> list[Span]:
    """The spans of a line of OTLP JSON."""
    return list(spans_of(json.loads(request)))


def names_in(request: bytes) -> list[str]:
    return [span.name for span in spans_in(request)]
