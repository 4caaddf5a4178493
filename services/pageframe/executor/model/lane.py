"""A CPU as a device that computes beside Python: steps run in order on a thread of their own.

Kernels give Python's lock away, so whoever applies plans and takes in tokens may do that while a
step is computed. A step that was launched behind another begins as soon as that one has its tokens.

    step thread   launch k+1 │ take in k-1 │ wait for k │ launch k+2 │ take in k │ ..
    lane          [        k          ][       k+1             ][      k+2
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageframe.config.cores import go_first
from pageframe.executor.batch import NEWEST, Int32Array, StepBatch, StepOutput, do_nothing
from pageframe.executor.block_moves import Int64Array


@dataclass(eq=False, slots=True)
class LaneFlight:
    """See ``Flight``.

    Attributes:
        batch: Its input tokens are written where some are to come.
        coming: int64, indices into T of those tokens.
        coming_rows: Whose they are.
        work: Computes the step, once all its tokens are known.
        output: What it yields, when it is over; else None.
        error: What it failed with, when it is over.
        is_over: Set when it is over.
    """

    batch: StepBatch
    coming: Int64Array
    coming_rows: NDArray[np.integer]
    work: Callable[[], StepOutput]
    output: StepOutput | None = None
    error: Exception | None = None
    is_over: threading.Event = field(default_factory=threading.Event)

    is_ahead = takes_cores = True

    def wait(self) -> None:
        """See ``Flight.wait``."""
        self.is_over.wait()

    def collect(self) -> StepOutput:
        """See ``Flight.collect``.

        Raises:
            Exception: what the step failed with.
        """
        self.is_over.wait()
        if self.error is not None:
            raise self.error
        assert self.output is not None, "a step that is over has failed, or yields something"
        return self.output


class Lane:
    """Computes steps in the order in which they are launched."""

    def __init__(self) -> None:
        self._newest: Int32Array = np.empty(0, dtype=np.int32)
        self._flights: queue.SimpleQueue[LaneFlight | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def launch(self, batch: StepBatch, work: Callable[[], StepOutput]) -> LaneFlight:
        """Begin a step, on which nothing but tokens of the one before may be missing.

        Args:
            batch: Its input tokens may hold ``NEWEST`` until ``work`` is called.
            work: Computes it; called on another thread.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lane", daemon=True)
            self._thread.start()
        coming = (batch.token_ids == NEWEST).nonzero()[0]
        rows = np.repeat(batch.rows, np.diff(batch.query_start)) if len(coming) else batch.rows
        flight = LaneFlight(batch, coming, rows[coming], work)
        batch.on_launch()
        # Neither is for the thread that computes.
        batch.on_launch = batch.meanwhile = do_nothing
        self._flights.put(flight)
        return flight

    def close(self) -> None:
        """End the thread, behind what was launched."""
        if self._thread is not None:
            self._flights.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        go_first()
        while (flight := self._flights.get()) is not None:
            try:
                flight.output = self._step(flight)
                flight.output.over_ns = time.monotonic_ns()
            except Exception as error:
                flight.error = error
            flight.is_over.set()

    def _step(self, flight: LaneFlight) -> StepOutput:
        if len(flight.coming):
            flight.batch.token_ids[flight.coming] = self._newest[flight.coming_rows]
        output = flight.work()
        rows = flight.batch.sample_rows
        num_rows = int(rows.max(initial=-1)) + 1
        if num_rows > len(self._newest):
            self._newest = np.resize(self._newest, num_rows)
        self._newest[rows] = output.token_ids
        return output
