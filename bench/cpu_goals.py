"""What a CPU has to reach, and what the other benches' figures say of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.engines.report import is_ours, rivals

Figures = Mapping[str, Any]

ENGINE_RATIO_MIN = 1.15
SPLIT_RATIO_MIN = 0.97
TRACING_RATIO_MIN = 0.98
READING_RATIO_MIN = 0.5
READY_S_MAX = 5.0
FIRST_TOKEN_S_MAX = 1.0

_SINGLE_STREAM = "E"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A figure and its border.

    Attributes:
        what: What was measured, with its unit.
        found: The figure; None where it could not be had.
        border: What it has to reach.
        is_low_better: Whether it has to stay below.
    """

    what: str
    found: float | None
    border: float
    is_low_better: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED``, or ``not measured``."""
        if self.found is None:
            return "not measured"
        is_met = self.found <= self.border if self.is_low_better else self.found >= self.border
        return "met" if is_met else "MISSED"


Judge = Callable[[Figures], Iterator[Finding]]


def of_engines(figures: Figures) -> Iterator[Finding]:
    """Each workload against the best peer of its kind; a stream by itself by time for a token."""
    rows = figures["rows"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        here = [row for row in rows if row["workload"] == workload]
        speeds = {row["engine"]: _speed(row) for row in here}
        is_served = {row["engine"]: row["is_served"] for row in here}
        for engine in filter(is_ours, speeds):
            peers = {name: speeds[name] for name in rivals(engine, is_served)}
            best = max(peers, key=peers.__getitem__, default=None)
            yield Finding(
                what=f"{workload}: {engine}, times {best or 'a peer'}",
                found=speeds[engine] / peers[best] if best else None,
                border=ENGINE_RATIO_MIN,
            )


def of_split(figures: Figures) -> Iterator[Finding]:
    """Three processes beside one."""
    yield Finding(what="three processes, times one", found=figures["ratio"], border=SPLIT_RATIO_MIN)


def of_tracing(figures: Figures) -> Iterator[Finding]:
    """Every KV operation traced, beside none."""
    yield Finding(
        what=f"traced, times untraced ({figures['options']['runner']})",
        found=figures["ratio"],
        border=TRACING_RATIO_MIN,
    )


def of_attention(figures: Figures) -> Iterator[Finding]:
    """Keys and values that attention of decodes goes through, beside plain reading.

    Nothing is found where not as many threads have read as have computed.
    """
    num_threads = figures["num_threads"]
    is_alike = figures["read_num_threads"] == num_threads
    for shape in figures["shapes"]:
        where = "{dtype}, {num_sequences} x {context_len}".format(**shape)
        yield Finding(
            what=f"attention, {where}, times a plain read, threads: {num_threads}",
            found=shape["part_of_plain_read"]["built"] if is_alike else None,
            border=READING_RATIO_MIN,
        )


def of_starting(figures: Figures) -> Iterator[Finding]:
    """The slowest start, and the slowest first token after one."""
    here = figures["checkouts"]["here"]
    for what, found, border in (
        ("ready after, s", here["ready_s"]["max"], READY_S_MAX),
        ("first token after that, s", here["first_token_s"]["max"], FIRST_TOKEN_S_MAX),
    ):
        yield Finding(what=what, found=found, border=border, is_low_better=True)


def _speed(row: Figures) -> float:
    """Tokens a second, whatever the row tells of them."""
    if row["workload"] == _SINGLE_STREAM:
        return 1e3 / float(row["token_ms"])
    return float(row["output_tokens_per_s"])
