"""Where the time of ended requests went, as running totals that a page takes differences of."""

from collections.abc import Iterable
from typing import NamedTuple

from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading


class StallSample(NamedTuple):
    """Totals since the gateway began.

    Attributes:
        time_ns: When they were read, nanoseconds since the Unix epoch.
        compute_s: Time in which samples were worked on, seconds.
        stall_s: Time that they waited, seconds by cause; causes that never came are left out.
    """

    time_ns: int
    compute_s: float
    stall_s: dict[str, float]


def sample_stalls(readings: Iterable[Reading], now_ns: int) -> StallSample:
    """The totals in what a gateway tells for its metrics."""
    compute_s, stall_s = 0.0, {}
    for metric, value, labels in readings:
        if metric is metrics.COMPUTE_SECONDS and isinstance(value, int | float):
            compute_s = float(value)
        elif metric is metrics.STALL_SECONDS and isinstance(value, int | float) and value:
            stall_s[labels[0]] = float(value)
    return StallSample(now_ns, compute_s, stall_s)
