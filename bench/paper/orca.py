"""The paper's baselines: batching by iteration, with memory reserved ahead for whole outputs.

Orca (Yu et al., OSDI 2022) is not public; the paper made its own (section 6.1) and so do we, with
the same assumptions: requests join and leave between iterations, first come first served; each
gets one contiguous region when it joins, placed by a buddy allocator, for

    Max      the 2,048 tokens of the model
    Pow2     its prompt and its true output rounded up to a power of two
    Oracle   its prompt and its true output, which no real system knows

A batch costs what ``CostModel`` says, as for the paged system. Between two events nothing changes
but that every running request grows by one token a step, so a run of steps is taken at once.
"""

import enum
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.paper.buddy import BuddyAllocator, round_up_to_power_of_two
from bench.paper.cost_model import CostModel
from bench.paper.lengths import MAX_MODEL_LEN
from bench.paper.run_log import FloatArray, Run, Usage, UsageTable
from bench.paper.workload import Workload

_NS = 1e9
_NUM_STEPS_MAX = 4096


@enum.unique
class Reservation(enum.Enum):
    """How much is reserved for a request."""

    MAX = "Orca (Max)"
    POW2 = "Orca (Pow2)"
    ORACLE = "Orca (Oracle)"

    def num_slots(self, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """Slots to reserve, before the allocator rounds them up."""
        if self is Reservation.MAX:
            return MAX_MODEL_LEN
        if self is Reservation.POW2:
            num_output_tokens = round_up_to_power_of_two(num_output_tokens)
        return min(MAX_MODEL_LEN, num_prompt_tokens + num_output_tokens)


@dataclass(frozen=True, slots=True)
class _Request:
    """A sequence that runs or waits; ``index`` is its request's."""

    index: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class _Running:
    """A sequence in the batch.

    The keys and values of the last token are never computed, so it ends with one slot less than
    it has tokens.
    """

    request: _Request
    address: int
    num_reserved: int
    num_computed: int = 0
    num_output_left: int = 0


class OrcaServer:
    """Serves one workload; see the module text.

    Args:
        reservation: What to reserve.
        cost: Cost of a step, and size of KV memory.
        max_num_running: Most sequences in a batch.
        max_step_tokens: Most tokens that a batch computes; prompts are not cut.
    """

    def __init__(
        self,
        reservation: Reservation,
        cost: CostModel,
        *,
        max_num_running: int,
        max_step_tokens: int,
    ) -> None:
        self._reservation = reservation
        self._cost = cost
        self._max_num_running = max_num_running
        self._max_step_tokens = max_step_tokens
        self._memory = BuddyAllocator(cost.num_slots)
        self._now_ns = 0.0
        self._running: list[_Running] = []
        self._waiting: deque[_Request] = deque()
        self._usage: list[Usage] = []
        self._num_left: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._end_ns: FloatArray = np.zeros(0)

    def serve(self, workload: Workload) -> Run:
        """Run until every request has its output; call it once."""
        arrivals = deque(enumerate(workload.arrival_ns.tolist()))
        self._num_left = np.full(len(workload), workload.num_samples, dtype=np.int64)
        self._end_ns = np.zeros(len(workload))
        while arrivals or self._waiting or self._running:
            while arrivals and arrivals[0][1] <= self._now_ns:
                self._arrive(workload, arrivals.popleft()[0])
            is_open = self._admit()
            next_arrival_ns = arrivals[0][1] if arrivals else np.inf
            if not self._running:
                self._now_ns = next_arrival_ns
            else:
                self._advance(next_arrival_ns if is_open else np.inf)
        output = workload.lengths.num_output_tokens
        latency = (self._end_ns - workload.arrival_ns) / _NS / output
        return Run(self._reservation.value, UsageTable.of(self._usage), latency)

    def _arrive(self, workload: Workload, index: int) -> None:
        prompt = int(workload.lengths.num_prompt_tokens[index])
        output = int(workload.lengths.num_output_tokens[index])
        self._waiting += [_Request(index, prompt, output)] * workload.num_samples

    def _admit(self) -> bool:
        """Let the first in line join; says whether a newcomer could join the next step too."""
        num_tokens_left = self._max_step_tokens - len(self._running)
        while self._waiting:
            request = self._waiting[0]
            if len(self._running) >= self._max_num_running:
                return False
            num_slots = self._reservation.num_slots(
                request.num_prompt_tokens, request.num_output_tokens
            )
            if request.num_prompt_tokens > num_tokens_left:
                return True
            address = self._memory.allocate(num_slots)
            if address is None:
                return False
            self._waiting.popleft()
            num_tokens_left -= request.num_prompt_tokens
            joined = _Running(request, address, num_slots)
            joined.num_output_left = request.num_output_tokens
            self._running.append(joined)
        return True

    def _advance(self, until_ns: float) -> None:
        """Take steps until somebody ends or may join."""
        fresh = [one for one in self._running if not one.num_computed]
        num_prompt_tokens = sum(one.request.num_prompt_tokens for one in fresh)
        for one in fresh:
            one.num_computed = one.request.num_prompt_tokens - 1
        # A waiting sequence that did not fit into the token budget may join the next step.
        is_single = bool(fresh) or (bool(self._waiting) and until_ns < np.inf)
        num_steps = 1 if is_single else self._num_equal_steps(until_ns)
        num_running = len(self._running)
        num_context = sum(one.num_computed for one in self._running)
        num_new = num_running - len(fresh) + num_prompt_tokens
        growth = num_running * (num_steps + 1) / 2
        cost_ns = self._cost.of_step(num_new, num_context + growth)
        self._record(num_steps, num_context + growth)
        self._now_ns += num_steps * cost_ns
        for one in self._running:
            one.num_computed += num_steps
            one.num_output_left -= num_steps
        self._release()

    def _num_equal_steps(self, until_ns: float) -> int:
        """Steps until somebody ends, or until the one in which ``until_ns`` passes."""
        num_steps = min(_NUM_STEPS_MAX, min(one.num_output_left for one in self._running))
        if until_ns == np.inf:
            return num_steps
        num_running = len(self._running)
        num_context = sum(one.num_computed for one in self._running)
        steps = np.arange(1, num_steps + 1)
        contexts = num_context * steps + num_running * steps * (steps + 1) / 2
        ends_ns = self._now_ns + steps * self._cost.of_step(num_running, 0)
        ends_ns = ends_ns + self._cost.context_token_ns * contexts
        return min(num_steps, int(np.searchsorted(ends_ns, until_ns)) + 1)

    def _record(self, num_steps: int, num_token_slots: float) -> None:
        num_final = sum(
            one.request.num_prompt_tokens + one.request.num_output_tokens - 1
            for one in self._running
        )
        num_reserved = sum(one.num_reserved for one in self._running)
        self._usage.append(
            Usage(
                start_ns=self._now_ns,
                num_steps=num_steps,
                num_running=len(self._running),
                num_token_slots=num_token_slots,
                num_future_slots=num_final - num_token_slots,
                num_unused_slots=num_reserved - num_final,
                num_held_slots=self._memory.num_held,
                is_waiting=bool(self._waiting),
            )
        )

    def _release(self) -> None:
        staying = []
        for one in self._running:
            if one.num_output_left:
                staying.append(one)
                continue
            self._memory.free(one.address)
            index = one.request.index
            self._num_left[index] -= 1
            self._end_ns[index] = self._now_ns
        self._running = staying
