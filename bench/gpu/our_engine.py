"""Pageframe in one process without gRPC: the scheduler's core, the step engine and the runner.

    this thread    submit ─▶ Scheduler.plan ──▶ plans ──▶ a thread: StepEngine.step
                             Scheduler.on_result ◀── results ◀──┘  (kernels)

The scheduler plans step k + 1 while step k runs, as it does over the wire. The decoder is the one
for GPUs, whatever the device: on a CPU its kernels are interpreted.
"""

import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.lab import Sizes
from bench.gpu.loads import Answer, EngineError, Request
from bench.gpu.made_up import llama_config, opener
from pageframe.core.clock import SystemClock
from pageframe.core.plan import StepPlan
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import ModelFacts
from pageframe.executor.engine import StepEngine
from pageframe.executor.lookout import Lookout
from pageframe.executor.model.announcing import announce_nothing
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.device_decoder import DeviceDecoder
from pageframe.executor.model.dtypes import dtype_name
from pageframe.executor.model.layer_groups import one_group
from pageframe.executor.model.native_choice import TRITON
from pageframe.executor.model.runner import PagedRunner
from pageframe.executor.model.sampling_choice import SamplingRequest, choose_sampling
from pageframe.scheduler.core import Events, Scheduler
from pageframe.scheduler.options import SchedulerOptions

BLOCK_SIZE = 16
_GATEWAY = 1
# As services do: see pageframe.rpc.lifecycle.
_SWITCH_INTERVAL_S = 0.0005
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Capacity:
    """How large an engine is made.

    Attributes:
        num_tokens: Tokens of keys and values that fit.
        num_sequences: Requests that run at once.
        max_model_len: Most tokens of one request.
        num_step_tokens: Tokens that one step computes at most.
    """

    num_tokens: int
    num_sequences: int
    max_model_len: int
    num_step_tokens: int


class OurEngine:
    """Pageframe's scheduler, engine and native runner over made-up weights."""

    name = "Pageframe"

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, capacity: Capacity
    ) -> None:
        self._clock = SystemClock()
        self._runner = _make_runner(sizes, device, dtype, capacity)
        # One block per sequence more than tokens need: each ends somewhere inside a block.
        num_blocks = -(-capacity.num_tokens // BLOCK_SIZE) + 2 * capacity.num_sequences
        self._engine = StepEngine(
            self._runner,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_sequences=capacity.num_sequences,
            max_step_tokens=capacity.num_step_tokens,
            max_model_len=capacity.max_model_len,
            trace=NullTraceSink(),
            clock=self._clock,
            # Each request is new: what is measured is computing.
            has_prefix_cache=False,
        )
        self._runner.warm_up()
        self._scheduler = Scheduler(
            self._engine.describe("bench"),
            SchedulerOptions(
                token_budget=capacity.num_step_tokens,
                max_num_running=capacity.num_sequences,
                max_queued_tokens=2 * capacity.num_tokens,
                shares_prefixes=False,
            ),
            trace=NullTraceSink(),
            clock=self._clock,
        )
        self._num_handed_in = 0
        self._facts = {
            "torch": torch.__version__,
            "num_blocks": num_blocks,
            "block_bytes": self._runner.block_bytes,
            "num_step_tokens": capacity.num_step_tokens,
        }

    def facts(self) -> dict[str, object]:
        """Versions and sizes."""
        return dict(self._facts)

    def serve(self, requests: Sequence[Request]) -> list[Answer]:
        """Do all requests at once."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        steps = _Steps(self._engine)
        try:
            return self._serve(requests, steps)
        finally:
            steps.stop()
            sys.setswitchinterval(before)

    def close(self) -> None:
        """Give back weights and blocks."""
        self._engine.close()

    def _serve(self, requests: Sequence[Request], steps: "_Steps") -> list[Answer]:
        first_handle = self._num_handed_in + 1
        self._num_handed_in += len(requests)
        started_s = time.perf_counter()
        for offset, request in enumerate(requests):
            self._submit(first_handle + offset, request)
        answers = [Answer([], []) for _ in requests]
        num_left = len(requests)
        while num_left:
            self._send(steps)
            result, end_s = steps.take()
            events = self._scheduler.on_result(result, self._clock.now_ns())
            num_left -= self._take_in(events, answers, first_handle, end_s - started_s)
        return answers

    def _take_in(
        self, events: Events, answers: list[Answer], first_handle: int, now_s: float
    ) -> int:
        """Enter tokens and their time; how many requests have ended."""
        num_ended = 0
        for _, message in events:
            taken = 0
            for handle, count in zip(message.handles, message.num_tokens, strict=True):
                answer = answers[handle - first_handle]
                answer.token_ids.extend(message.token_ids[taken : taken + count])
                answer.times_s.extend([now_s] * count)
                taken += count
            for completion in message.completions:
                if completion.finish_reason is not FinishReason.LENGTH:
                    why = self._engine.last_failure or completion.error_message
                    raise EngineError(
                        f"a request ended with {completion.finish_reason.name}: {why}"
                    )
                num_ended += 1
        return num_ended

    def _submit(self, handle: int, request: Request) -> None:
        self._scheduler.submit(
            Submission(
                handle=handle,
                request_id=str(handle),
                prompt_token_ids=request.prompt_token_ids,
                sampling=SamplingParams(
                    temperature=0.0, max_tokens=request.num_out, ignore_eos=True
                ),
                arrival_ns=self._clock.now_ns(),
            ),
            _GATEWAY,
        )

    def _send(self, steps: "_Steps") -> None:
        while (plan := self._scheduler.plan(self._clock.now_ns())) is not None:
            steps.post(plan)


class _Steps:
    """The thread that steps; it lives as long as one load. See ``executor.step_thread``."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        # A number says that so many steps are over.
        self._plans: queue.SimpleQueue[StepPlan | int | None] = queue.SimpleQueue()
        self._num_collected = 0
        self._lookout = Lookout(self._plans.put)
        self._results: queue.SimpleQueue[tuple[StepResult, float] | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def post(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def take(self) -> tuple[StepResult, float]:
        """The next result, and when its tokens were known."""
        try:
            found = self._results.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise EngineError(f"no step ended in {_PATIENCE_S:.0f} seconds") from None
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        self._plans.put(None)
        # A step that hangs must not hang who gives up on it.
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            while (message := self._plans.get()) is not None:
                if isinstance(message, StepPlan):
                    self._launch(message)
                elif message > self._num_collected:
                    self._collect()
        except Exception as error:
            self._results.put(error)
        finally:
            self._lookout.close()

    def _launch(self, plan: StepPlan) -> None:
        launching = self._engine.launching
        if launching.num_in_flight and not launching.may_follow(plan):
            self._collect()
        self._engine.launch(plan)
        if launching.num_in_flight > 1:
            self._collect()
        flight = launching.flight_under_way()
        if flight is None:
            self._collect()
        else:
            self._lookout.watch(self._num_collected + 1, flight.wait)

    def _collect(self) -> None:
        self._num_collected += 1
        self._results.put((self._engine.collect(), time.perf_counter()))


def _make_runner(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, capacity: Capacity
) -> PagedRunner:
    config = parse_decoder_config(llama_config(sizes, capacity.max_model_len))
    decoder = DeviceDecoder(
        Path(), config, dtype, device, lambda *_: None, open_weights=opener(sizes)
    )
    kv_bytes = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * dtype.itemsize
    facts = ModelFacts(
        name="made-up",
        folder="",
        vocab_size=sizes.vocab_size,
        max_model_len=capacity.max_model_len,
        eos_token_ids=(1,),
        kv_bytes_per_token=kv_bytes,
        device=str(device),
        dtype=dtype_name(dtype),
        kv_dtype=dtype_name(dtype),
        runner="native",
        kernels=TRITON,
    )
    sampler, on_device = choose_sampling(
        SamplingRequest(
            decoder=decoder,
            facts=facts,
            device=device,
            grammars=None,
            max_num_sequences=capacity.num_sequences,
            # The interpreter has nothing to record.
            has_graphs=device.type == "cuda",
            announce=announce_nothing,
        )
    )
    return PagedRunner(
        decoder,
        facts,
        sampler,
        device,
        dtype,
        max_step_tokens=capacity.num_step_tokens,
        groups=one_group(sizes.num_layers),
        on_device=on_device,
    )
