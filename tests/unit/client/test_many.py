"""Many generations of one client on one stream, against a gateway that plays a script."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import types

import grpc
import pytest

from pageframe.client import AsyncPageframeClient, Delta, Finished, GenerationRequest, Started
from pageframe.client.many import ManyGenerations
from pageframe.core.errors import (
    AbortedError,
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    PageframeError,
    UnavailableError,
)
from pageframe.core.limits import LIMITS
from pageframe.v1 import gateway_service_pb2 as pb
from unit.client.played_gateway import (
    PlayedGateway,
    PlayedManyGateway,
    delta,
    end,
    header,
    playing,
    playing_many,
    run,
)

WHOLE = [header(), delta("a", 1), end(1)]
GONE = UnavailableError("DRAINING", "gone")
REQUEST = GenerationRequest(prompt="x")


async def heard(client, request=REQUEST, **options):
    async with contextlib.aclosing(client.generate(request, **options)) as events:
        return [event async for event in events]


def tasks_of_streams():
    return [task for task in asyncio.all_tasks() if "_Stream." in repr(task.get_coro())]


def orders_of(gateway, number):
    return [gateway.orders.get(timeout=20) for _ in range(number)]


def test_generations_at_the_same_time_share_a_stream_and_are_kept_apart():
    scripts = [[header(), delta(str(number), number), end(1)] for number in range(8)]

    async def scenario(client):
        return await asyncio.gather(
            *(heard(client, GenerationRequest(prompt=str(number))) for number in range(8))
        )

    with playing_many(*scripts) as (gateway, address):
        all_events = run(address, scenario)
        orders = orders_of(gateway, 8)
    assert sorted(order.start.handle for order in orders) == list(range(1, 9)), "one stream"
    for number, events in enumerate(all_events):
        told = [event.text for event in events if isinstance(event, Delta)]
        asked = next(order for order in orders if order.start.request.text == str(number))
        assert told == [str(asked.start.handle - 1)]


def test_nothing_is_open_behind_the_last_generation_and_the_next_one_opens_anew():
    async def scenario(client):
        for _ in range(3):
            assert len(await heard(client)) == 3
            assert not tasks_of_streams()

    with playing_many(WHOLE) as (gateway, address):
        run(address, scenario)
        # A stream for each: handles begin again.
        assert [order.start.handle for order in orders_of(gateway, 3)] == [1, 1, 1]


def test_a_stream_that_breaks_is_resumed_by_each_of_its_generations():
    breaks = threading.Event()
    scripts = [
        [header(seed=8), delta("a", 1)],
        [header(seed=9), delta("b", 2), breaks, (GONE,)],
        *[[header(), delta("c", 3), end(2)]] * 2,
    ]

    async def scenario(client):
        first, second = asyncio.create_task(heard(client)), asyncio.create_task(heard(client))
        await asyncio.sleep(0)
        breaks.set()
        return await first, await second

    with playing_many(*scripts) as (gateway, address):
        events = run(address, scenario)
    texts = [[event.text for event in one if isinstance(event, Delta)] for one in events]
    assert texts == [["a", "c"], ["b", "c"]]
    resumed = [
        (request.sampling.seed, list(request.resume_outputs[0].token_ids))
        for request in gateway.requests[2:]
    ]
    assert sorted(resumed) == [(8, [1]), (9, [2])]


def test_a_failure_ends_one_generation_and_not_the_stream():
    goes_on = threading.Event()
    scripts = [[header()], [AbortedError("WHY", "because", num_things=3)], [goes_on, *WHOLE]]

    async def scenario(client):
        events = client.generate(REQUEST)
        await anext(events)
        with pytest.raises(AbortedError) as caught:
            await heard(client)
        goes_on.set()
        last = await heard(client)
        await events.aclose()
        return caught.value, last

    with playing_many(*scripts) as (gateway, address):
        error, last = run(address, scenario)
        handles = [order.start.handle for order in orders_of(gateway, 3)]
    assert (error.reason, error.message, dict(error.limits)) == (
        "WHY",
        "because",
        {"num_things": "3"},
    )
    assert isinstance(last[-1], Finished)
    assert handles == [1, 2, 3]


def test_whoever_closes_takes_its_generation_back():
    goes_on = threading.Event()

    async def scenario(client):
        living = client.generate(REQUEST)
        await anext(living)
        closed = client.generate(REQUEST)
        await anext(closed)
        await closed.aclose()
        rest = await asyncio.to_thread(orders_of, gateway, 3)
        goes_on.set()
        await living.aclose()
        return rest

    with playing_many([header()]) as (gateway, address):
        first, second, third = run(address, scenario)
    assert (first.start.handle, second.start.handle) == (1, 2)
    assert third.cancel.handle == 2


def test_a_task_that_is_cancelled_takes_its_generation_back():
    async def scenario(client):
        living = client.generate(REQUEST)
        await anext(living)
        task = asyncio.create_task(heard(client))
        await asyncio.to_thread(orders_of, gateway, 2)
        task.cancel()
        (order,) = await asyncio.to_thread(orders_of, gateway, 1)
        await living.aclose()
        return order

    with playing_many([header()]) as (gateway, address):
        assert run(address, scenario).cancel.handle == 2


def test_a_silent_server_is_waited_for_until_the_deadline_as_on_a_stream_of_its_own():
    silent = threading.Event()

    async def scenario(client):
        with pytest.raises(DeadlineError) as caught:
            await heard(client, timeout_s=1.5)
        return caught.value

    errors = []
    try:
        for kind in (PlayedManyGateway, WaitingGateway):
            with playing([header(), silent], kind=kind) as (gateway, address):
                errors.append(run(address, scenario))
                if kind is PlayedManyGateway:
                    (order,) = orders_of(gateway, 1)
                    assert 0 < order.start.timeout.ToMilliseconds() <= 1500
                silent.set()
                silent = threading.Event()
    finally:
        silent.set()
    assert [(error.status, error.reason) for error in errors] == [
        ("DEADLINE_EXCEEDED", "TRANSPORT")
    ] * 2


class WaitingGateway(PlayedGateway):
    """Waits for events of its script."""

    def Generate(self, request, context):  # noqa: N802
        for step in super().Generate(request, context):
            if isinstance(step, threading.Event):
                step.wait(20)
            else:
                yield step


def test_time_that_is_over_is_not_asked_for():
    async def scenario(client):
        with pytest.raises(DeadlineError) as caught:
            await heard(client, timeout_s=0.0)
        return caught.value.reason

    with playing_many(WHOLE) as (gateway, address):
        assert run(address, scenario) == "DEADLINE_PASSED"
        assert gateway.requests == []


def test_a_time_without_end_is_none():
    async def scenario(client):
        return await heard(client, timeout_s=float("inf"))

    with playing_many(WHOLE) as (gateway, address):
        assert len(run(address, scenario)) == 3
        (order,) = orders_of(gateway, 1)
    assert not order.start.HasField("timeout")


def test_a_server_without_the_method_is_asked_for_each_by_itself():
    async def scenario(client):
        at_once = await asyncio.gather(*(heard(client) for _ in range(4)))
        return [*at_once, await heard(client)], client._many.is_offered

    with playing(WHOLE) as (gateway, address):
        all_events, is_offered = run(address, scenario)
    assert [len(events) for events in all_events] == [3] * 5
    assert not is_offered
    assert len(gateway.requests) == 5, "nothing was asked twice"


def test_what_is_too_large_for_a_message_ends_no_other():
    async def scenario(client):
        living = client.generate(REQUEST)
        await anext(living)
        with pytest.raises(InvalidRequestError) as caught:
            await heard(client, GenerationRequest(prompt="x" * (17 << 20)))
        await living.aclose()
        return caught.value

    with playing_many([header()]) as (gateway, address):
        error = run(address, scenario)
        assert len(gateway.requests) == 1
    assert error.reason == "REQUEST_TOO_LARGE"
    assert int(error.limits["num_bytes_max"]) == LIMITS.request_bytes_max


class PlayedCall:
    """A call that says and fails as the test says."""

    def __init__(self):
        self.written = []
        self.write_error = None
        self.messages = asyncio.Queue()

    async def write(self, message):
        if self.write_error is not None:
            raise self.write_error
        self.written.append(message)

    async def read(self):
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self):
        self.messages.put_nowait(status(grpc.StatusCode.CANCELLED, "by its caller"))


def status(code, details):
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, none, none, details=details)


def with_played_calls(scenario):
    """Runs it with a client's generations, and the calls that they open."""

    async def housed():
        calls = []

        def begin(**_options):
            calls.append(PlayedCall())
            return calls[-1]

        many = ManyGenerations(types.SimpleNamespace(GenerateMany=begin), ())
        try:
            return await asyncio.wait_for(scenario(many, calls), 20)
        finally:
            await many.close()

    return asyncio.run(housed())


async def turns_of_the_loop():
    for _ in range(5):
        await asyncio.sleep(0)


def accept(call, *parts):
    call.messages.put_nowait(pb.GenerateManyResponse(parts=parts))


def test_nothing_is_written_to_a_stream_that_may_be_refused():
    async def scenario(many, calls):
        async def ask():
            events = many.generate(REQUEST, None)
            task = asyncio.ensure_future(anext(events))
            await turns_of_the_loop()
            return events, task

        events, task = await ask()
        assert calls[0].written == [], "who knows whether there is such a method"
        accept(calls[0])
        await turns_of_the_loop()
        assert [order.WhichOneof("message") for order in calls[0].written] == ["start"]
        accept(calls[0], pb.GeneratePart(handle=1, header=header().header))
        await task
        accept(calls[0], pb.GeneratePart(handle=1, completion=end(1).completion))
        assert len([event async for event in events]) == 1

        events, task = await ask()
        assert len(calls[1].written) == 1, "the last one was accepted, and so is this one"
        accept(calls[1])
        calls[1].messages.put_nowait(status(grpc.StatusCode.UNAVAILABLE, "gone"))
        with pytest.raises(UnavailableError):
            await task

        events, task = await ask()
        assert calls[2].written == [], "who knows why the last one broke"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with_played_calls(scenario)


def test_a_closed_client_is_no_broken_stream():
    async def scenario(many, _calls):
        task = asyncio.ensure_future(anext(many.generate(REQUEST, None)))
        await turns_of_the_loop()
        await many.close()
        with pytest.raises(CancelledError) as caught:
            await task
        return caught.value.reason

    assert with_played_calls(scenario) == "CLIENT_CLOSED"


@pytest.mark.parametrize("is_writing", [True, False])
def test_a_write_that_meets_the_end_of_a_stream_means_that_it_broke(is_writing):
    async def scenario(many, calls):
        lost = status(grpc.StatusCode.INTERNAL, "Internal error from Core.")
        tasks = [asyncio.ensure_future(anext(many.generate(REQUEST, None))) for _ in range(2)]
        await turns_of_the_loop()
        if is_writing:
            calls[0].write_error = lost
        accept(calls[0])
        await turns_of_the_loop()
        calls[0].messages.put_nowait(lost)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert errors[0] is not errors[1], "each is raised elsewhere"
        return {(type(error), error.reason) for error in errors}

    broken = (UnavailableError, "STREAM_BROKEN") if is_writing else (InternalError, "TRANSPORT")
    assert with_played_calls(scenario) == {broken}


def test_closing_the_client_ends_what_lives():
    async def scenario():
        client = AsyncPageframeClient(address)
        events = client.generate(REQUEST)
        await anext(events)
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(CancelledError) as caught:
            await asyncio.wait_for(reading, 20)
        assert not tasks_of_streams()
        return caught.value.reason

    with playing_many([header()]) as (_, address):
        assert asyncio.run(scenario()) == "CLIENT_CLOSED"


def test_a_slow_consumer_holds_up_no_other_and_loses_nothing():
    many = [header(), *(delta("a", number) for number in range(200)), end(200)]

    async def scenario(client):
        slow = client.generate(REQUEST)
        await anext(slow)
        return await heard(client), [event async for event in slow]

    with playing_many(many) as (_, address):
        quick, slow = run(address, scenario)
    assert isinstance(quick[0], Started)
    for *deltas, last in (quick[1:], slow):
        assert all(isinstance(event, Delta) for event in deltas)
        assert isinstance(last, Finished)
        # However many of them were there together.
        assert [token_id for one in deltas for token_id in one.token_ids] == list(range(200))


class LaterGateway(PlayedManyGateway):
    """Sends parts of a kind that is not known here in place of deltas."""

    def GenerateMany(self, request_iterator, context):  # noqa: N802
        for response in super().GenerateMany(request_iterator, context):
            for part in response.parts:
                part.ClearField("delta")
            yield response


def test_a_part_of_a_kind_that_is_not_known_ends_its_generation():
    async def scenario(client):
        with pytest.raises(PageframeError) as caught:
            await heard(client)
        return caught.value.reason

    with playing([header(), delta("a", 1), end(1)], kind=LaterGateway) as (_, address):
        assert run(address, scenario) == "UNKNOWN_MESSAGE"


def test_a_part_of_a_kind_that_is_not_known_ends_a_completion_before_its_end():
    has_failed, has_gone_on = threading.Event(), threading.Event()

    def script():
        yield from (header(), delta("a", 1))
        if not has_failed.wait(20):
            has_gone_on.set()
        yield end(1)

    async def scenario(client):
        with pytest.raises(PageframeError) as caught:
            await client.complete(REQUEST)
        assert not has_gone_on.is_set()
        has_failed.set()
        return caught.value.reason

    with playing(script(), kind=LaterGateway) as (_, address):
        assert run(address, scenario) == "UNKNOWN_MESSAGE"


def test_the_context_of_a_program_that_traces_is_sent_with_each_start(monkeypatch):
    async def scenario(client):
        await heard(client)

    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    tracer = types.SimpleNamespace(inject=lambda carrier: carrier.update(traceparent=parent))
    with playing_many(WHOLE) as (gateway, address):
        monkeypatch.setitem(sys.modules, "opentelemetry.propagate", tracer)
        run(address, scenario)
        monkeypatch.delitem(sys.modules, "opentelemetry.propagate")
        run(address, scenario)
        traced, alone = orders_of(gateway, 2)
    assert traced.start.traceparent == parent
    assert alone.start.traceparent == ""


LEFT_OPEN = """
import asyncio, gc, sys
from pageframe.client import AsyncPageframeClient, GenerationRequest

async def ask(is_whole):
    client = AsyncPageframeClient(sys.argv[2])
    async for event in client.generate(GenerationRequest(prompt="x")):
        if not is_whole:
            break

if sys.argv[1] == "closes the loop":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask(True))
    loop.close()
else:
    asyncio.run(ask(False))
gc.collect()
print("all is well")
"""


@pytest.mark.parametrize("how", ["closes the loop", "leaves in the midst"])
def test_a_program_that_closes_nothing_hears_no_complaint(how):
    with playing_many(WHOLE) as (_, address):
        ended = subprocess.run(
            [sys.executable, "-W", "always", "-c", LEFT_OPEN, how, address],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.stdout == "all is well\n"
    assert [line for line in ended.stderr.splitlines() if "goaway" not in line] == [], ended.stderr
