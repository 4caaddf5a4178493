"""What a gateway counts."""

import asyncio

from pageframe.core.clock import ManualClock
from pageframe.core.errors import UnavailableError
from pageframe.core.request import Completion, Delivery, StallCause
from pageframe.core.step import FinishReason, SequenceAccount
from pageframe.gateway.mailbox import Pending
from pageframe.gateway.metering import GatewayMeter, RequestTimes
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Histogram
from unit.gateway.driving import abandon, make_service, next_output, start

MS = 1_000_000


def values_of(readings):
    found = {}
    for metric, value, labels in readings:
        is_histogram = isinstance(value, Histogram)
        found[(metric, *labels)] = (sum(value.counts), value.total) if is_histogram else value
    return found


def completion(**fields):
    return Completion(handle=1, sample_index=0, finish_reason=FinishReason.STOP, **fields)


def test_the_first_token_and_the_times_between_are_told_apart():
    meter, times = GatewayMeter(), RequestTimes(1000 * MS)
    meter.take(times, {0: Pending(token_ids=[1])}, 1040 * MS)
    meter.take(times, {1: Pending(token_ids=[2, 3])}, 1050 * MS)
    meter.take(times, {0: Pending(token_ids=[4, 5, 6]), 1: Pending()}, 1070 * MS)
    values = values_of(meter.read(3))
    assert values[metrics.TTFT,] == (1, 0.04), "sample 1 is not the request's first"
    num, total = values[metrics.INTER_TOKEN,]
    assert num == 3, "three tokens share the 30 ms since the last of their sample"
    assert abs(total - 0.03) < 1e-9
    assert values[metrics.LIVING_REQUESTS,] == 3


def test_a_prompt_counts_once_and_what_its_samples_cost_adds_up():
    meter = GatewayMeter()
    account = SequenceAccount(num_copies_on_write=2, num_draft_tokens=5, num_accepted_tokens=3)
    samples = [
        completion(num_prompt_tokens=10, num_cached_tokens=0, num_output_tokens=4),
        completion(
            num_prompt_tokens=10,
            num_cached_tokens=8,
            num_output_tokens=6,
            account=account,
            stall_ns={StallCause.QUEUE: 250 * MS},
            compute_ns=500 * MS,
        ),
    ]
    meter.end("alice", samples, 900 * MS, None)
    values = values_of(meter.read(0))
    assert values[metrics.REQUESTS, "alice", "ok"] == 1
    assert values[metrics.PROMPT_TOKENS, "alice"] == 10
    assert values[metrics.CACHED_TOKENS, "alice"] == 8
    assert values[metrics.OUTPUT_TOKENS, "alice"] == 10
    assert values[metrics.STALL_SECONDS, "queue"] == 0.25
    assert values[metrics.STALL_SECONDS, "kv_full"] == 0
    assert values[metrics.COMPUTE_SECONDS,] == 0.5
    assert values[metrics.COPIES_ON_WRITE,] == 2
    assert values[metrics.DRAFT_TOKENS,] == 5
    assert values[metrics.ACCEPTED_TOKENS,] == 3
    assert values[metrics.REQUEST_SECONDS,] == (1, 0.9)


def test_errors_are_counted_by_their_reason():
    meter = GatewayMeter()
    meter.end("a", [], 5, UnavailableError("SCHEDULER_LOST", "away"))
    meter.end("a", [], 5, GeneratorExit())
    values = values_of(meter.read(0))
    assert values[metrics.REQUESTS, "a", "scheduler_lost"] == 1
    assert values[metrics.REQUESTS, "a", "client_gone"] == 1
    assert values[metrics.REQUEST_SECONDS,] == (0, 0.0), "a failure is no latency"


def drive(link, scenario, **fields):
    async def run():
        service = make_service(link)
        service._clock = clock = ManualClock(1000 * MS)
        outputs, _, following = await start(service, **fields)
        await scenario(service, clock, outputs, following)
        return values_of(service.readings())

    return asyncio.run(run())


def test_a_generation_is_counted_from_its_arrival_to_its_end(link):
    async def scenario(service, clock, outputs, following):
        assert values_of(service.readings())[metrics.LIVING_REQUESTS,] == 1
        clock.advance_ns(30 * MS)
        link.mailboxes[0].put_tokens(0, [40])
        await following
        clock.advance_ns(10 * MS)
        link.mailboxes[0].put_tokens(0, [41])
        link.end(1, num_prompt_tokens=7)
        async for _ in outputs:
            pass

    values = drive(link, scenario)
    assert values[metrics.TTFT,] == (1, 0.03)
    assert values[metrics.INTER_TOKEN,] == (1, 0.01)
    assert values[metrics.REQUESTS, "default", "ok"] == 1
    assert values[metrics.PROMPT_TOKENS, "default"] == 7
    assert values[metrics.LIVING_REQUESTS,] == 0


def test_a_consumer_that_stops_behind_the_last_output_has_not_gone_away(link):
    async def scenario(service, clock, outputs, following):
        link.mailboxes[0].put_tokens(0, [40])
        link.end(1)
        await following
        await next_output(outputs)
        await outputs.aclose()

    assert drive(link, scenario)[metrics.REQUESTS, "default", "ok"] == 1


def test_one_that_stops_before_has(link):
    async def scenario(service, clock, outputs, following):
        await abandon(outputs, following)

    assert drive(link, scenario)[metrics.REQUESTS, "default", "client_gone"] == 1


def test_times_between_tokens_say_nothing_where_all_come_at_the_end(link):
    async def scenario(service, clock, outputs, following):
        link.mailboxes[0].put_tokens(0, [40, 41])
        link.end(1)
        await following
        async for _ in outputs:
            pass

    values = drive(link, scenario, delivery=Delivery.FINAL)
    assert values[metrics.TTFT,] == (0, 0.0)
    assert values[metrics.REQUEST_SECONDS,][0] == 1
