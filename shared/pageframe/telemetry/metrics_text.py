"""Readings as Prometheus text, by the Prometheus project's own library.

That library and not OpenTelemetry's exporter, which is a bridge onto it: with a collector of its
own it asks for values when it is scraped, so nothing is counted twice and no thread runs between.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pageframe.telemetry.metrics import Histogram, Metric, MetricKind, Reading

Read = Callable[[], Iterable[Reading]]
"""What a service has to tell now."""


class MetricsText:
    """All metrics of one process: its own, and those of the process itself (``process_…``).

    Args:
        read: Tells them.
    """

    def __init__(self, read: Read) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Readings(read))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Their values now, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


class _Readings(Collector):
    def __init__(self, read: Read) -> None:
        self._read = read

    def describe(self) -> Iterable[Family]:
        # Asked for when it is registered: there may be no values yet.
        return []

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        for reading in self._read():
            metric = reading.metric
            if metric.name not in families:
                families[metric.name] = _family(metric)
            _add(families[metric.name], reading)
        yield from families.values()


def _family(metric: Metric) -> Family:
    match metric.kind:
        case MetricKind.COUNTER:
            return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        case MetricKind.GAUGE:
            return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        case MetricKind.HISTOGRAM:
            return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)


def _add(family: Family, reading: Reading) -> None:
    labels, value = list(reading.labels), reading.value
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(value, Histogram), f"{family.name} is a histogram"
        names = [*map(str, value.bounds), "+Inf"]
        counts = itertools.accumulate(value.counts)
        family.add_metric(labels, list(zip(names, counts, strict=True)), value.total)
    else:
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily), family.name
        assert not isinstance(value, Histogram), f"{family.name} is no histogram"
        family.add_metric(labels, value)
