"""Trace context as it travels inside the system: two raw ids."""

_SIZES = ((0, 0), (16, 8))


def is_trace_context(trace_id: bytes, span_id: bytes) -> bool:
    """Whether the ids have the sizes that W3C trace context gives them, or are both empty."""
    return (len(trace_id), len(span_id)) in _SIZES
