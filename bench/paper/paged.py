"""The real scheduler, engine and KV memory over the simulated runner, in virtual time.

    arrivals ─▶ Scheduler ─plan─▶ StepEngine ─▶ SimRunner (advances the clock)
                    ▲                 │
                    └──── result ─────┘

Nothing here decides anything: requests are handed in when the clock says so, plans go to the
engine and results back, and before each step runs, KV memory is read off.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from bench.paper.cost_model import CostModel
from bench.paper.lengths import MAX_MODEL_LEN
from bench.paper.metering import VOCAB_SIZE, MeteredRunner, read_usage
from bench.paper.run_log import FloatArray, Run, Usage, UsageTable
from bench.paper.workload import Workload
from pageframe.core.clock import ManualClock
from pageframe.core.plan import StepPlan
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import StepBatch
from pageframe.executor.engine import StepEngine
from pageframe.scheduler.core import Events, Scheduler
from pageframe.scheduler.options import SchedulerOptions

_NS = 1e9
_GATEWAY = 1
_NO_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedConfig:
    """How the system under test is set up.

    Attributes:
        block_size: Tokens per block.
        max_num_running: Most sequences that run at once.
        token_budget: Most tokens that a step computes.
        lookahead: Whether a step is planned while the one before it runs.
    """

    block_size: int = 16
    max_num_running: int = 256
    token_budget: int = 2560
    lookahead: bool = True


class PagedServer:
    """Serves one workload.

    Args:
        config: The system under test.
        cost: Cost of a step, and size of KV memory.
        seed: Of token ids; no two prompts have a beginning in common.
    """

    def __init__(self, config: PagedConfig, cost: CostModel, *, seed: int) -> None:
        self._config = config
        self._clock = ManualClock(1)
        self._usage: list[Usage] = []
        self._runner = MeteredRunner(
            cost, num_rows=config.max_num_running, clock=self._clock, on_execute=self._note_usage
        )
        self._engine = StepEngine(
            self._runner,
            num_blocks=cost.num_slots // config.block_size,
            block_size=config.block_size,
            max_num_sequences=config.max_num_running,
            max_step_tokens=config.token_budget,
            max_model_len=MAX_MODEL_LEN,
            trace=NullTraceSink(),
            clock=self._clock,
        )
        self._scheduler = Scheduler(
            self._engine.describe("bench"),
            SchedulerOptions(
                token_budget=config.token_budget,
                max_num_running=config.max_num_running,
                lookahead=config.lookahead,
                max_queued_requests=_NO_LIMIT,
                max_queued_tokens=_NO_LIMIT,
            ),
            trace=NullTraceSink(),
            clock=self._clock,
        )
        self._rng = np.random.default_rng(seed)
        self._plans: deque[StepPlan] = deque()
        self._num_living = 0
        self._num_preemptions = 0
        self._end_ns: FloatArray = np.zeros(0)

    def serve(self, workload: Workload) -> Run:
        """Run until every request has its output; call it once."""
        clock, scheduler = self._clock, self._scheduler
        self._end_ns = np.zeros(len(workload))
        arrivals = deque(enumerate(workload.arrival_ns.tolist()))
        while arrivals or self._num_living:
            while arrivals and arrivals[0][1] <= clock.now_ns():
                self._submit(workload, arrivals.popleft()[0])
            while (plan := scheduler.plan(clock.now_ns())) is not None:
                self._plans.append(plan)
            if self._plans:
                self._take(self._engine.step(self._plans.popleft()))
            else:
                assert arrivals, f"{self._num_living} sequences live, and nothing is planned"
                clock.advance_ns(arrivals[0][1] - clock.now_ns())
        assert self._engine.account().held == 0, "blocks are held when nobody runs"
        output = workload.lengths.num_output_tokens
        latency = (self._end_ns - workload.arrival_ns) / _NS / output
        return Run("Pageframe", UsageTable.of(self._usage), latency, self._num_preemptions)

    def _submit(self, workload: Workload, index: int) -> None:
        lengths = workload.lengths
        prompt = self._rng.integers(1, VOCAB_SIZE, int(lengths.num_prompt_tokens[index]))
        sampling = SamplingParams(
            max_tokens=int(lengths.num_output_tokens[index]),
            ignore_eos=True,
            temperature=1.0,
            seed=index,
        )
        self._num_living += workload.num_samples
        self._scheduler.submit(
            Submission(
                handle=index + 1,
                request_id=str(index),
                prompt_token_ids=prompt.tolist(),
                num_samples=workload.num_samples,
                sampling=sampling,
                delivery=Delivery.FINAL,
            ),
            _GATEWAY,
        )

    def _take(self, result: StepResult) -> None:
        self._num_preemptions += len(result.preempted_ids)
        events: Events = self._scheduler.on_result(result, self._clock.now_ns())
        for _, message in events:
            for completion in message.completions:
                assert not completion.error_reason, completion
                self._num_living -= 1
                self._end_ns[completion.handle - 1] = self._clock.now_ns()

    def _note_usage(self, batch: StepBatch) -> None:
        usage = read_usage(self._engine, batch)
        usage.start_ns = self._clock.now_ns()
        usage.num_copies = self._runner.take_num_copies()
        usage.is_waiting = self._num_living > usage.num_running
        self._usage.append(usage)
