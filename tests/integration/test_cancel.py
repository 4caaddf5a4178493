"""Whoever stops wanting tokens, in whatever way and state: every block comes back."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator

import grpc
import pytest

from integration.system import PATIENCE_S, ClientProcess, System, error_info, eventually
from pageframe.client import GenerationRequest
from pageframe.core.step import FinishReason
from pageframe.v1.gateway_service_pb2 import CancelRequest, GenerateRequest, TokenIds
from pageframe.v1.gateway_service_pb2_grpc import GatewayServiceStub
from pageframe.v1.scheduler_service_pb2 import SequenceSnapshot
from pageframe.v1.sequence_pb2 import SamplingParameters

NUM_SLOTS = 8
POOL_NUM_TOKENS = 2400
SETTLE_S = 3.0
"""Less than what is stopped here would take to end by itself."""
SHORT_PROMPT, LONG_PROMPT = [5] * 3, [5] * 1400


def ask(request_id: str, prompt: list[int], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=TokenIds(ids=prompt),
        sampling=SamplingParameters(max_tokens=max_tokens, temperature=0.0),
    )


def is_queued(sequence: SequenceSnapshot) -> bool:
    return sequence.state == "waiting"


def is_in_prefill(sequence: SequenceSnapshot) -> bool:
    return sequence.state == "running" and 0 < sequence.num_computed_tokens < len(LONG_PROMPT)


def is_decoding(sequence: SequenceSnapshot) -> bool:
    return sequence.state == "running" and sequence.num_tokens > len(SHORT_PROMPT) + 2


STATES = {
    "queued": (is_queued, SHORT_PROMPT),
    "prefill": (is_in_prefill, LONG_PROMPT),
    "decode": (is_decoding, SHORT_PROMPT),
}


@contextlib.contextmanager
def occupied(system: System, num_slots: int) -> Iterator[None]:
    """Keep this many slots taken while the block runs."""
    with contextlib.ExitStack() as blockers:
        for index in range(num_slots):
            request = ask(f"blocker-{index}", SHORT_PROMPT, 250)
            next(blockers.enter_context(system.stream(request)))
        if num_slots:
            eventually(lambda: system.snapshot().num_running == num_slots, "all slots are taken")
        yield


def wait_for(system: System, is_there: Callable[[SequenceSnapshot], bool]) -> None:
    def condition() -> bool:
        sequence = system.sequence("victim")
        return sequence is not None and is_there(sequence)

    eventually(condition, "the victim is where it shall end")


def end_by_closing(system: System, victim: GenerateRequest, is_there) -> None:
    with system.stream(victim):
        wait_for(system, is_there)


def end_by_cancel_call(system: System, victim: GenerateRequest, is_there) -> None:
    with system.stream(victim) as stream:
        wait_for(system, is_there)
        system.gateway.Cancel(CancelRequest(request_id="victim"), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
    assert error_info(ended.value)[:2] == (grpc.StatusCode.CANCELLED, "CANCELLED")


def end_by_deadline(system: System, victim: GenerateRequest, is_there) -> None:
    call = system.gateway.Generate(victim, timeout=0.5)
    wait_for(system, is_there)
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def end_by_death(system: System, victim: GenerateRequest, is_there) -> None:
    with ClientProcess(system.address, victim) as client:
        client.read_until("header")
        wait_for(system, is_there)
        client.kill()


WAYS = {
    "closing": end_by_closing,
    "cancel call": end_by_cancel_call,
    "deadline": end_by_deadline,
    "death": end_by_death,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
def test_a_request_ends_in_every_state(slow_system: System, way: str, state: str) -> None:
    is_there, prompt = STATES[state]
    with occupied(slow_system, NUM_SLOTS if state == "queued" else 0):
        # As long as the pool allows: what is not stopped runs on past any wait of this test.
        victim = ask("victim", prompt, POOL_NUM_TOKENS - len(prompt))
        WAYS[way](slow_system, victim, is_there)
        eventually(lambda: slow_system.sequence("victim") is None, "the victim is gone", SETTLE_S)
        if state == "queued":
            assert slow_system.snapshot().num_running == NUM_SLOTS, "nobody else was hurt"
    slow_system.settle(SETTLE_S)


def test_a_stop_string_ends_the_sequence_and_not_only_its_text(slow_system: System) -> None:
    request = GenerationRequest(
        token_ids=SHORT_PROMPT, max_tokens=400, temperature=0.0, ignore_eos=True
    )
    with slow_system.client() as client:
        events = client.generate(request)
        text = ""
        while len(text) < 20:
            text += getattr(next(events), "text", "")
        events.close()
        stop = text[12:15]
        end = text.index(stop)
        stopped = client.complete(
            GenerationRequest(
                token_ids=SHORT_PROMPT,
                max_tokens=400,
                temperature=0.0,
                ignore_eos=True,
                stop=[stop],
            )
        )
    (sample,) = stopped.samples
    assert (sample.text, sample.stop) == (text[:end], stop)
    assert sample.finish_reason is FinishReason.STOP
    assert sample.account.num_completion_tokens < 50
    slow_system.settle(SETTLE_S)


def test_cancelling_what_does_not_live_is_said(slow_system: System) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        slow_system.gateway.Cancel(CancelRequest(request_id="nobody"), timeout=PATIENCE_S)
    assert error_info(refused.value)[0] is grpc.StatusCode.NOT_FOUND


def test_two_hundred_requests_aborted_anywhere_leave_nothing(slow_system: System) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    reference = GenerationRequest(token_ids=[9] * 40, max_tokens=30, seed=11)
    before = slow_system.complete(reference).samples[0].token_ids
    endings = asyncio.run(_abort_many(slow_system.address, 200, random.Random(seed)))
    slow_system.settle(SETTLE_S)
    assert slow_system.complete(reference).samples[0].token_ids == before
    # A run in which nothing was under way when it was aborted would show nothing.
    assert endings.count("aborted") > 100, endings


async def _abort_many(address: str, num_requests: int, rng: random.Random) -> list[str]:
    slots = asyncio.Semaphore(24)
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        stub = GatewayServiceStub(channel)
        plans = [_Plan(f"r{index}", rng) for index in range(num_requests)]

        async def abort(plan: "_Plan") -> str:
            async with slots:
                return await plan.run(stub)

        return list(await asyncio.gather(*map(abort, plans)))


class _Plan:
    """One request, and where and how it will be aborted."""

    def __init__(self, request_id: str, rng: random.Random) -> None:
        prompt = [rng.randrange(2, 400) for _ in range(rng.choice((1, 3, 17, 120)))]
        # Most would run for seconds if nobody stopped them, the others end by themselves.
        self._request = ask(request_id, prompt, rng.choice((3, 500, 900)))
        self._request.num_samples = rng.choice((1, 1, 1, 3))
        self._num_messages = rng.randrange(12)
        self._way = rng.choice(("close", "cancel", "deadline"))
        self._timeout_s = rng.uniform(0.0, 0.4) if self._way == "deadline" else PATIENCE_S

    async def run(self, stub: GatewayServiceStub) -> str:
        call = stub.Generate(self._request, timeout=self._timeout_s)
        try:
            num_messages = 0
            async for _ in call:
                num_messages += 1
                if num_messages > self._num_messages and self._way != "deadline":
                    return await self._abort(stub, call)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            return "aborted"
        return "ended"

    async def _abort(self, stub: GatewayServiceStub, call: grpc.aio.Call) -> str:
        if self._way == "close":
            call.cancel()
            return "aborted"
        try:
            await stub.Cancel(CancelRequest(request_id=self._request.request_id))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return "ended"
        with contextlib.suppress(grpc.RpcError):
            async for _ in call:
                pass
        return "aborted"
