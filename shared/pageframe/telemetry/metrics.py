"""Every metric of the system, each spelt in one place, and what their values are kept in.

A service keeps plain numbers and hands out ``Reading``s when somebody asks; nothing is made, locked
or formatted before that. Names and labels follow Prometheus: base units, ``_total`` for counters.
"""

import enum
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple


@enum.unique
class MetricKind(enum.StrEnum):
    """What may be done with a metric's values."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: With its unit.
        kind: Counter, gauge or histogram.
        labels: What its values are told apart by.
        services: Who has it.
        help: One sentence.
    """

    name: str
    kind: MetricKind
    labels: tuple[str, ...] = ()
    services: tuple[str, ...]
    help: str


class Reading(NamedTuple):
    """One value of a metric now; ``labels`` are in the metric's order."""

    metric: Metric
    value: "float | Histogram"
    labels: tuple[str, ...] = ()


class Histogram:
    """Counts values by size.

    Args:
        bounds: Upper bounds of the buckets, rising; one more bucket is above all.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(bounds), f"bounds must rise: {bounds}"
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count ``count`` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class BoundedNames:
    """Names that come from outside, such as tenants, as label values: not more than so many.

    Each label value is a time series, in Prometheus for ever; whoever comes late is ``(other)``.
    """

    def __init__(self, num_names_max: int = 100) -> None:
        self._num_names_max = num_names_max
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        """The label value that stands for a name."""
        if name not in self._known:
            if len(self._known) >= self._num_names_max:
                return OTHER_NAMES
            self._known.add(name)
        return name


OTHER_NAMES: Final = "(other)"

# Of seconds: a first token may be a step away or minutes; between tokens it is steps.
TTFT_BOUNDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
INTER_TOKEN_BOUNDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 5.0, 30.0),
)
REQUEST_BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
STEP_BOUNDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 5.0),
)

_GATEWAY, _SCHEDULER, _EXECUTOR = ("gateway",), ("scheduler",), ("executor",)
_ALL_SERVICES = (*_GATEWAY, *_SCHEDULER, *_EXECUTOR)


def _counter(name: str, text: str, services: tuple[str, ...], *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, labels=labels, services=services, help=text)


def _gauge(name: str, text: str, services: tuple[str, ...], *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, labels=labels, services=services, help=text)


def _histogram(name: str, text: str, services: tuple[str, ...]) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, services=services, help=text)


REQUESTS = _counter(
    "pageframe_requests_total",
    "Requests that have ended: ok, client_gone, or the reason of their error.",
    _GATEWAY, "tenant", "outcome",
)  # fmt: skip
LIVING_REQUESTS = _gauge(
    "pageframe_living_requests", "Requests at the gateway that have not ended.", _GATEWAY
)
POOL_VIEWERS = _gauge(
    "pageframe_pool_viewers", "Browsers that look at the pool page now.", _GATEWAY
)
POOL_VIEWER_RESETS = _counter(
    "pageframe_pool_viewer_resets_total",
    "How often one of them was so slow that it was told everything again.",
    _GATEWAY,
)
REPLICA_HEALTHY = _gauge(
    "pageframe_gateway_replica_healthy",
    "1 while a replica is connected, has an executor and does not drain; else 0.",
    _GATEWAY, "replica",
)  # fmt: skip
REPLICA_REQUESTS = _counter(
    "pageframe_gateway_replica_requests_total", "Requests that were sent to a replica.",
    _GATEWAY, "replica",
)  # fmt: skip
REPLICA_SPILLS = _counter(
    "pageframe_gateway_replica_spills_total",
    "Requests that belong to a replica and went to another one because it was busy.",
    _GATEWAY, "replica",
)  # fmt: skip
REPLICA_MOVED = _counter(
    "pageframe_gateway_replica_moved_total",
    "Requests that went on elsewhere because their replica was lost.",
    _GATEWAY, "replica",
)  # fmt: skip
TTFT = _histogram(
    "pageframe_ttft_seconds",
    "From the arrival of a request to its first token; of those delivered as they come.",
    _GATEWAY,
)
INTER_TOKEN = _histogram(
    "pageframe_inter_token_seconds",
    "Between two tokens of a sample, as they leave the gateway; merged ones share their time.",
    _GATEWAY,
)
REQUEST_SECONDS = _histogram(
    "pageframe_request_seconds", "From the arrival of a request to its last output.", _GATEWAY
)
PROMPT_TOKENS = _counter(
    "pageframe_prompt_tokens_total", "Prompt tokens of requests that ended well.",
    _GATEWAY, "tenant",
)  # fmt: skip
CACHED_TOKENS = _counter(
    "pageframe_cached_prompt_tokens_total",
    "Those of them that were found in the prefix cache.",
    _GATEWAY, "tenant",
)  # fmt: skip
OUTPUT_TOKENS = _counter(
    "pageframe_output_tokens_total", "Output tokens of samples that have ended.",
    _GATEWAY, "tenant",
)  # fmt: skip
STALL_SECONDS = _counter(
    "pageframe_stall_seconds_total", "Time that ended samples waited, by cause.",
    _GATEWAY, "cause",
)  # fmt: skip
COMPUTE_SECONDS = _counter(
    "pageframe_compute_seconds_total", "Time in which ended samples were worked on.", _GATEWAY
)
COPIES_ON_WRITE = _counter(
    "pageframe_copies_on_write_total", "Blocks copied because ended samples shared them.", _GATEWAY
)
DRAFT_TOKENS = _counter(
    "pageframe_draft_tokens_total", "Draft tokens that were computed for ended samples.", _GATEWAY
)
ACCEPTED_TOKENS = _counter(
    "pageframe_accepted_draft_tokens_total", "Those of them that were kept.", _GATEWAY
)
SEQUENCES = _gauge(
    "pageframe_sequences", "Living sequences: running, waiting, or preempted.",
    _SCHEDULER, "state",
)  # fmt: skip
TENANT_SEQUENCES = _gauge(
    "pageframe_tenant_sequences", "The same by tenant; preempted ones are waiting.",
    _SCHEDULER, "tenant", "state",
)  # fmt: skip
QUEUED_REQUESTS = _gauge(
    "pageframe_queued_requests", "Requests none of whose sequences has run yet.", _SCHEDULER
)
QUEUED_TOKENS = _gauge(
    "pageframe_queued_tokens", "Prompt tokens of those, over all samples.", _SCHEDULER
)
STEPS_IN_FLIGHT = _gauge(
    "pageframe_steps_in_flight", "Plans that were sent and not yet answered.", _SCHEDULER
)
EXECUTOR_CONNECTED = _gauge(
    "pageframe_executor_connected", "1 while the scheduler has an executor, else 0.", _SCHEDULER
)
STEP_SECONDS = _histogram(
    "pageframe_step_seconds", "Duration of a step in the executor.", _SCHEDULER
)
STEP_PART_SECONDS = _counter(
    "pageframe_step_part_seconds_total",
    "Time of steps by part: apply, execute, sample; copy is within execute.",
    _SCHEDULER, "part",
)  # fmt: skip
SAMPLED_TOKENS = _counter(
    "pageframe_sampled_tokens_total", "Tokens that steps have sampled.", _SCHEDULER
)
PREEMPTIONS = _counter(
    "pageframe_preemptions_total", "Sequences that had to give blocks up, by recovery.",
    _SCHEDULER, "recovery",
)  # fmt: skip
PREEMPTED_BLOCKS = _counter(
    "pageframe_preempted_blocks_total", "Blocks that those gave up.", _SCHEDULER
)
REFUSED_ENTRIES = _counter(
    "pageframe_refused_entries_total", "Entries of plans that were not taken, by reason.",
    _SCHEDULER, "because",
)  # fmt: skip
MOVED_BLOCKS = _counter(
    "pageframe_moved_blocks_total", "Blocks moved to the host tier or from there.", _SCHEDULER
)
BLOCKS = _gauge("pageframe_blocks", "Blocks of the pool by state.", _EXECUTOR, "state")
PINNED_BLOCKS = _gauge("pageframe_pinned_blocks", "Held blocks that are pinned.", _EXECUTOR)
HOST_BLOCKS = _gauge("pageframe_host_blocks", "Blocks in the host tier.", _EXECUTOR)
HOST_BLOCKS_MAX = _gauge(
    "pageframe_host_blocks_max", "Blocks that the host tier can hold.", _EXECUTOR
)
TENANT_BLOCKS = _gauge(
    "pageframe_tenant_held_blocks", "Blocks that a tenant holds.", _EXECUTOR, "tenant"
)
KV_OPERATIONS = _counter(
    "pageframe_kv_operations_total", "Operations on blocks, as they are traced.", _EXECUTOR
)
DROPPED_RECORDS = _counter(
    "pageframe_trace_dropped_records_total",
    "Trace records that found no room in the ring.",
    _ALL_SERVICES,
)

METRICS: Final[tuple[Metric, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)
"""All of them, in the order in which documents list them."""
