"""An executor by itself, and a scheduler that gets everything wrong."""

import itertools
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from integration.system import PATIENCE_S, environment, error_info, eventually, log_failures
from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.rpc.channel import INNER_OPTIONS
from pageframe.v1 import executor_service_pb2_grpc
from pageframe.v1.executor_service_pb2 import (
    RECOVERY_RECOMPUTE,
    RECOVERY_UNSPECIFIED,
    Announcement,
    CancelSequences,
    DescribeRequest,
    PlanEntries,
    PlanFork,
    PlanVictims,
    RunRequest,
    RunResponse,
    SchedulerHello,
    StepPlan,
)
from pageframe.v1.sequence_pb2 import FINISH_REASON_ERROR, SamplingParameters

NUM_BLOCKS = 16
MAX_STEP_TOKENS = 128
_epochs = itertools.count(1)


class Executor:
    """An executor process without a scheduler."""

    def __init__(self, folder: Path, model: Path) -> None:
        settings = Settings(
            model=str(model),
            runner="sim",
            sim_step_seconds=0.0,
            block_size=16,
            num_blocks=NUM_BLOCKS,
            token_budget=MAX_STEP_TOKENS,
            max_num_sequences=8,
            max_model_len=1024,
            state_dir=folder,
        )
        launch = Launch(
            settings=settings,
            model_path=model,
            run_dir=folder,
            num_threads=1,
            supervisor_pid=os.getpid(),
        )
        launch.write(folder / "launch.json")
        self.log = folder / "executor.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pageframe.executor", "--settings", folder / "launch.json"],
                env=environment(),
                stdout=log,
                stderr=log,
            )
        self._channel = grpc.insecure_channel(launch.executor_address, options=INNER_OPTIONS)
        self.stub = executor_service_pb2_grpc.ExecutorServiceStub(self._channel)
        eventually(self._is_serving, "the executor answers")

    def _is_serving(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.stub.Describe(DescribeRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    def nobody_holds_a_block(self) -> bool:
        pool = self.stub.Describe(DescribeRequest(), timeout=PATIENCE_S).pool
        return pool.free + pool.cached == pool.total == NUM_BLOCKS

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0

    def kill(self) -> None:
        self._channel.close()
        self.process.kill()
        self.process.wait()


class Stream:
    """One scheduler's stream; a context manager."""

    def __init__(self, executor: Executor) -> None:
        self._requests: queue.SimpleQueue[RunRequest | None] = queue.SimpleQueue()
        self._call = executor.stub.Run(iter(self._requests.get, None), timeout=PATIENCE_S)

    def __enter__(self) -> "Stream":
        hello = SchedulerHello(scheduler_id="a test", epoch=next(_epochs))
        assert self.exchange(RunRequest(hello=hello)).HasField("hello")
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._call.cancel()

    def exchange(self, request: RunRequest) -> RunResponse:
        self._requests.put(request)
        return next(self._call)

    def plan(self, step: int, **parts) -> RunResponse:
        parts.setdefault("builds_on", step - 1)
        return self.exchange(RunRequest(plan=StepPlan(step=step, **parts)))


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory, sim_model: Path) -> Iterator[Executor]:
    executor = Executor(tmp_path_factory.mktemp("executor"), sim_model)
    yield executor
    executor.stop()
    executor.kill()
    assert log_failures(executor.log) == []


@pytest.fixture(autouse=True)
def _the_next_scheduler_is_served(executor: Executor) -> Iterator[None]:
    yield
    assert executor.process.poll() is None, executor.log.read_text()
    with Stream(executor) as stream:
        assert executor.nobody_holds_a_block(), "what the last one had is given back"
        result = stream.plan(1, announce=[announcement(1)], may=entries((1, 0, 3))).result
        assert list(result.sampled_ids) == [1]


def announcement(sequence_id: int, **fields) -> Announcement:
    whole = {
        "token_ids": [3, 4, 5],
        "num_prompt_tokens": 3,
        "sampling": SamplingParameters(seed=1, max_tokens=200),
        "request_id": "r",
    }
    return Announcement(sequence_id=sequence_id, **whole | fields)


def entries(*rows: tuple[int, int, int]) -> PlanEntries:
    sequence_ids, generations, num_tokens = zip(*rows, strict=True)
    return PlanEntries(sequence_ids=sequence_ids, generations=generations, num_tokens=num_tokens)


def victims(sequence_id: int, recovery: int, generation: int = 0) -> PlanVictims:
    return PlanVictims(
        sequence_ids=[sequence_id],
        generations=[generation],
        recoveries=[recovery],
        num_blocks=[1],
        beneficiary_ids=[0],
    )


MALFORMED = {
    "step 0": {"step": 0},
    "arrays of different lengths": {
        "may": PlanEntries(sequence_ids=[1, 2], generations=[0], num_tokens=[3])
    },
    "an entry of no tokens": {"may": entries((1, 0, 0))},
    "a recovery left open": {"victims": victims(1, RECOVERY_UNSPECIFIED)},
    "an unknown recovery": {"victims": victims(1, 99)},
    "sequence id 0": {"announce": [announcement(0)]},
    "a sequence id past 63 bits": {"announce": [announcement(2**63)]},
    "a generation past 31 bits": {"announce": [announcement(2, generation=2**31)]},
    "no tokens": {"announce": [announcement(2, token_ids=[])]},
    "more prompt than tokens": {"announce": [announcement(2, num_prompt_tokens=4)]},
    "sampling left open": {"announce": [announcement(2, sampling=None)]},
    "a trace id of the wrong size": {"announce": [announcement(2, trace_id=b"short")]},
    "a span id of the wrong size": {
        "announce": [announcement(2, trace_id=b"t" * 16, span_id=b"x")]
    },
    "a fork of different lengths": {
        "forks": [PlanFork(parent_id=1, child_ids=[2], sample_indices=[1, 2])]
    },
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_plan_ends_the_stream_with_a_status(executor: Executor, name: str) -> None:
    plan = {"step": 2, "builds_on": 1} | MALFORMED[name]
    with Stream(executor) as stream:
        stream.plan(1, announce=[announcement(1)], may=entries((1, 0, 3)))
        with pytest.raises(grpc.RpcError) as ended:
            stream.plan(**plan)
    code, reason, _ = error_info(ended.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MALFORMED_STEP")


REFUSED = {
    "a step again": ({"step": 1, "builds_on": 0}, "STEP_OUT_OF_ORDER"),
    "a step left out": ({"step": 3, "builds_on": 2}, "STEP_OUT_OF_ORDER"),
    "a step from elsewhere": ({"step": 2**64 - 1, "builds_on": 1}, "STEP_OUT_OF_ORDER"),
    "what was never applied": ({"builds_on": 7}, "BUILDS_ON_UNAPPLIED_STEP"),
    "more than there is": (
        {"announce": [], "must": entries((2, 0, 2**32 - 1))},
        "STEP_TOKENS_EXCEEDED",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cannot_be_is_refused_whole(executor: Executor, name: str) -> None:
    """And the sequence that runs goes on with the next sound plan."""
    plan, reason = REFUSED[name]
    prompt = announcement(2, token_ids=[7] * 200, num_prompt_tokens=200, cache_salt=name.encode())
    with Stream(executor) as stream:
        first = stream.plan(
            1, announce=[announcement(1), prompt], may=entries((1, 0, 3), (2, 0, 64))
        )
        assert list(first.result.sampled_ids) == [1]
        refused = stream.plan(**{"step": 2, "builds_on": 1} | plan).refusal
        assert (refused.reason, refused.last_applied_step) == (reason, 1)
        # A refused plan uses up its number, one that came out of order does not.
        step = 2 if reason == "STEP_OUT_OF_ORDER" else 3
        assert list(stream.plan(step, builds_on=1).result.sampled_ids) == [1]


STRANGERS = {
    "must": {"must": entries((77, 0, 1))},
    "may": {"may": entries((77, 0, 1))},
    "may of another generation": {"may": entries((1, 5, 1))},
    "must of another generation": {"must": entries((1, 5, 1))},
    "a victim": {"victims": victims(77, RECOVERY_RECOMPUTE)},
    "an announcement that is known": {"announce": [announcement(1)]},
    "ids past 63 bits": {"may": entries((2**64 - 1, 0, 1)), "must": entries((2**63, 0, 1))},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_entries_of_nobody_are_skipped_and_reported(executor: Executor, name: str) -> None:
    with Stream(executor) as stream:
        stream.plan(1, announce=[announcement(1)], may=entries((1, 0, 3)))
        result = stream.plan(2, **STRANGERS[name]).result
        assert result.stale_ids, "it is reported"
        assert list(result.sampled_ids) == [1], "the others run"


HOPELESS = {
    "a token id out of range": {"token_ids": [3, 401, 5]},
    "a token id past 31 bits": {"token_ids": [3, 2**32 - 1, 5]},
    "longer than any sequence": {"token_ids": [3] * 1024, "num_prompt_tokens": 1024},
    "its output all there": {
        "token_ids": [3, 4, 5, 6],
        "sampling": SamplingParameters(seed=1, max_tokens=1),
    },
    "a temperature that is no number": {
        "sampling": SamplingParameters(seed=1, max_tokens=9, temperature=float("nan"))
    },
    "more output than can be counted": {
        "sampling": SamplingParameters(seed=1, max_tokens=2**32 - 1)
    },
    "no tokens wanted": {"sampling": SamplingParameters(seed=1, max_tokens=0)},
    "a stop token out of range": {
        "sampling": SamplingParameters(seed=1, max_tokens=9, stop_token_ids=[2**32 - 1])
    },
    "too many log-probabilities": {
        "sampling": SamplingParameters(seed=1, max_tokens=9, num_logprobs=2**32 - 1)
    },
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_sequence_that_can_never_run_ends_alone(executor: Executor, name: str) -> None:
    with Stream(executor) as stream:
        stream.plan(1, announce=[announcement(1)], may=entries((1, 0, 3)))
        announced = [announcement(2, **HOPELESS[name])]
        result = stream.plan(2, announce=announced, may=entries((2, 0, 3))).result
        ends = dict(zip(result.sampled_ids, result.finish_reasons, strict=True))
        assert ends.pop(2) == FINISH_REASON_ERROR
        assert list(ends) == [1], "the others run"
        assert list(stream.plan(3).result.sampled_ids) == [1]


def test_long_names_are_carried(executor: Executor) -> None:
    named = announcement(
        2**63 - 1,
        generation=2**31 - 1,
        sample_index=2**32 - 1,
        tenant="t" * 100_000,
        request_id="r" * 100_000,
        trace_id=b"t" * 16,
        span_id=b"s" * 8,
    )
    with Stream(executor) as stream:
        result = stream.plan(1, announce=[named], may=entries((2**63 - 1, 2**31 - 1, 3))).result
        assert list(result.sampled_ids) == [2**63 - 1]


def test_finishing_and_cancelling_strangers_changes_nothing(executor: Executor) -> None:
    with Stream(executor) as stream:
        stream.plan(1, announce=[announcement(1)], may=entries((1, 0, 3)))
        cancel = CancelSequences(sequence_ids=[0, 77, 2**64 - 1])
        assert not stream.exchange(RunRequest(cancel=cancel)).result.released_ids
        result = stream.plan(2, finish=[0, 77, 2**64 - 1]).result
        assert not result.released_ids
        assert list(result.sampled_ids) == [1]


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([], "HELLO_EXPECTED"),
        ([RunRequest(plan=StepPlan(step=1))], "HELLO_EXPECTED"),
        ([RunRequest(hello=SchedulerHello(epoch=2**63))], "SCHEDULER_ID_MISSING"),
        ([RunRequest(hello=SchedulerHello(scheduler_id="a test"))], "EPOCH_TOO_OLD"),
    ],
)
def test_a_stream_that_begins_wrong_is_refused(
    executor: Executor, requests: list[RunRequest], reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(executor.stub.Run(iter(requests), timeout=PATIENCE_S))
    assert error_info(refused.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, reason)


@pytest.mark.parametrize("request_", [RunRequest(), RunRequest(hello=SchedulerHello(epoch=9))])
def test_an_unexpected_message_ends_the_stream(executor: Executor, request_: RunRequest) -> None:
    with Stream(executor) as stream, pytest.raises(grpc.RpcError) as ended:
        stream.exchange(request_)
    expected = (grpc.StatusCode.FAILED_PRECONDITION, "UNEXPECTED_MESSAGE")
    assert error_info(ended.value)[:2] == expected


def test_the_same_scheduler_with_a_higher_epoch_takes_over(executor: Executor) -> None:
    with Stream(executor) as old:
        old.plan(1, announce=[announcement(1)], may=entries((1, 0, 3)))
        assert not executor.nobody_holds_a_block()
        with Stream(executor) as new:
            with pytest.raises(grpc.RpcError) as ended:
                old.plan(2)
            assert error_info(ended.value)[:2] == (grpc.StatusCode.ABORTED, "TAKEN_OVER")
            assert executor.nobody_holds_a_block()
            result = new.plan(1, announce=[announcement(1)], may=entries((1, 0, 3))).result
            assert list(result.sampled_ids) == [1]
