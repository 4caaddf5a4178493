"""What a run leaves behind: how KV memory was used in every step, and how long requests took."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Usage:
    """KV memory during a step, or on average over steps that differ in nothing but growth.

    Slots hold one token each. What a system has given out to requests is divided as in figure 2
    of the paper:

        [ token states )[ reservation )[ internal fragmentation )[ external fragmentation, others )
          written         will be        reserved, will never be   rounding, and what is given to
                          written        written                   nobody

    Attributes:
        start_ns: When the step began.
        num_steps: How many steps this stands for.
        num_running: Requests in the batch, each sample counted.
        num_token_slots: Slots that hold a token.
        num_future_slots: Reserved slots that will hold one.
        num_unused_slots: Reserved slots that never will.
        num_held_slots: Slots that are given out.
        num_blocks: Blocks that are given out; 0 where there are no blocks.
        num_blocks_unshared: Blocks that would be, if each sequence had its own.
        num_copies: Blocks copied before the step's writes.
        num_forks: Sequences that go on from the step as copies of another.
        is_waiting: Whether somebody has come and does not run.
    """

    start_ns: float
    num_steps: int = 1
    num_running: int = 0
    num_token_slots: float = 0
    num_future_slots: float = 0
    num_unused_slots: float = 0
    num_held_slots: float = 0
    num_blocks: int = 0
    num_blocks_unshared: int = 0
    num_copies: int = 0
    num_forks: int = 0
    is_waiting: bool = False


@dataclass(frozen=True, slots=True)
class UsageTable:
    """``Usage`` of a whole run, a column for each of its fields; float64 [num_records]."""

    columns: dict[str, FloatArray]

    @classmethod
    def of(cls, records: list[Usage]) -> Self:
        """Turn records into columns."""
        names = [field.name for field in fields(Usage)]
        return cls(
            {
                name: np.array([getattr(record, name) for record in records], dtype=np.float64)
                for name in names
            }
        )

    def between(self, start_ns: float, end_ns: float) -> Self:
        """The steps that began in ``[start_ns, end_ns)``."""
        start = self.columns["start_ns"]
        return self._select((start >= start_ns) & (start < end_ns))

    def under_pressure(self) -> Self:
        """The steps during which somebody waited."""
        return self._select(self.columns["is_waiting"] > 0)

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return int(self.columns["num_steps"].sum())

    def mean(self, name: str) -> float:
        """Mean of a column over steps; NaN without steps."""
        num_steps = self.columns["num_steps"]
        total = num_steps.sum()
        return float((self.columns[name] * num_steps).sum() / total) if total else float("nan")

    def _select(self, mask: NDArray[np.bool_]) -> Self:
        return type(self)({name: column[mask] for name, column in self.columns.items()})


@dataclass(frozen=True, slots=True)
class Run:
    """One system that served one workload.

    Attributes:
        system: Name of the system.
        usage: KV memory over the run.
        latency_s_per_token: float64 [num_requests], time from arrival to the last token divided by
            the length of the output; the paper's *normalised latency* (section 6.1).
        num_preemptions: How often a request lost its blocks.
    """

    system: str
    usage: UsageTable
    latency_s_per_token: FloatArray
    num_preemptions: int = 0

    @property
    def mean_latency_s_per_token(self) -> float:
        """Mean over requests."""
        return float(self.latency_s_per_token.mean())
