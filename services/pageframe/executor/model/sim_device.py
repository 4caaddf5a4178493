"""The simulated runner as a device that works beside Python, as a GPU does.

A step begins when the one before it is over, whenever it was launched, and takes what ``SimCost``
says of real time. Its tokens are on the device before the host hears of them: a step that was
launched behind finds them where it has ``NEWEST``. So whatever the host does between two steps is
hidden, or shows, as it would with a real one.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from pageframe.executor.batch import NEWEST, Flight, Int32Array, StepBatch, StepOutput
from pageframe.executor.model.sim import SimConfig, SimRunner


@dataclass(frozen=True, slots=True)
class _SimFlight:
    """See ``Flight``; over at ``end_ns`` of the monotonic clock, and silent until then."""

    output: StepOutput
    is_ahead: bool
    end_ns: int

    takes_cores = False

    def wait(self) -> None:
        """Sleep until it is over."""
        remaining_ns = self.end_ns - time.monotonic_ns()
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)

    def collect(self) -> StepOutput:
        """See ``Flight.collect``."""
        self.wait()
        return self.output


class SimDevice(SimRunner):
    """See the module text."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self._newest: Int32Array = np.zeros(config.max_num_rows, dtype=np.int32)
        self._free_ns = 0

    def launch(self, batch: StepBatch) -> Flight:
        """Begin a step when the one before it is over."""
        start_ns = max(time.monotonic_ns(), self._free_ns)
        batch.on_launch()
        output = self._compute(replace(batch, token_ids=self._resolve(batch)))
        output.execute_ns = self._config.cost.of(batch)
        self._newest[batch.sample_rows] = output.token_ids
        self._free_ns = output.over_ns = start_ns + output.execute_ns
        is_plain = batch.drafts is None and not (
            output.logprobs or output.prompt_logprobs or output.candidates
        )
        return _SimFlight(output, is_plain, self._free_ns)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Launch a step, and wait for it."""
        flight = self.launch(batch)
        batch.meanwhile()
        return flight.collect()

    def _resolve(self, batch: StepBatch) -> Int32Array:
        """Input tokens, those that were not known when the step was planned looked up."""
        is_unknown = batch.token_ids == NEWEST
        if not is_unknown.any():
            return batch.token_ids
        rows = np.repeat(batch.rows, np.diff(batch.query_start))
        resolved: Int32Array = np.where(is_unknown, self._newest[rows], batch.token_ids)
        return resolved
