"""Many generations on one stream, against a scheduler that does what the test says; no wire."""

import asyncio
import contextlib

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import (
    InvalidRequestError,
    PageframeError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.many import ManyStream, Start, TakeBack
from pageframe.gateway.output import Header, OutputDelta, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.rpc.auth import Authenticator
from pageframe.telemetry.metrics import REQUESTS

NUM_BATCH = 64


class Stream:
    """A stream of many generations, and a caller that reads when the test lets it."""

    def __init__(self, link, *, encode=None, **options):
        self.link = link
        self.service = GenerationService(
            link, CodecStore(), Authenticator({}), ManualClock(5), NullTraceSink(), **options
        )
        self.many = ManyStream(self.service, encode or (lambda handle, news: (handle, news)))
        self.messages = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.blocked = asyncio.Event()
        self.sent = asyncio.Queue()
        self._task = asyncio.create_task(self.many.run(self._all_sent(), _as_it_is, self._write))

    def start(self, handle, **fields):
        self.order(Start(handle, lambda: GenerateInput(**({"text": "the dog"} | fields)), None))

    def cancel(self, handle):
        self.order(TakeBack(handle))

    def order(self, order):
        self.sent.put_nowait(order)

    def end_own_side(self):
        self.sent.put_nowait(None)

    async def all_submitted(self, number):
        await until(lambda: len(self.link.submissions) == number)
        await until(lambda: kinds(self.messages).count("Header") == number)
        self.messages.clear()

    async def ended(self):
        await self._task

    async def leave(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def tokens(self, *numbers, token_ids=(72,)):
        for number in numbers:
            self.link.mailboxes[number].put_tokens(0, token_ids)

    async def _all_sent(self):
        while (order := await self.sent.get()) is not None:
            yield order

    async def _write(self, parts):
        if not self.reads.is_set():
            self.blocked.set()
        await self.reads.wait()
        self.messages.append(parts)


def _as_it_is(order):
    if isinstance(order, Exception):
        raise order
    return [order]


async def until(condition):
    while not condition():  # noqa: ASYNC110 - turns of the loop, not time
        await asyncio.sleep(0)


def parts_of(messages):
    return [part for parts in messages for part in parts]


def kinds(messages):
    return [type(news).__name__ for _, news in parts_of(messages)]


def errors(messages):
    return {
        handle: news.reason
        for handle, news in parts_of(messages)
        if isinstance(news, PageframeError)
    }


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_the_tokens_of_one_event_are_one_message(link):
    async def scenario():
        stream = Stream(link)
        for handle in range(1, NUM_BATCH + 1):
            stream.start(handle, request_id=f"r{handle}")
        await stream.all_submitted(NUM_BATCH)
        for _ in range(3):
            stream.tokens(*range(NUM_BATCH))
            before = len(stream.messages)
            await until(lambda before=before: len(stream.messages) > before)
        await stream.leave()
        return stream.messages

    messages = run(scenario)
    assert [len(parts) for parts in messages] == [NUM_BATCH] * 3
    for parts in messages:
        assert sorted(handle for handle, _ in parts) == list(range(1, NUM_BATCH + 1))
        assert {tuple(news.token_ids) for _, news in parts} == {(72,)}


def test_tokens_behind_an_unfinished_write_are_merged(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        stream.start(2, request_id="other")
        await stream.all_submitted(2)
        stream.reads.clear()
        stream.tokens(0, token_ids=[72])
        await stream.blocked.wait()
        for token_id in range(73, 83):
            stream.tokens(0, 1, token_ids=[token_id])
            await asyncio.sleep(0)
        stream.reads.set()
        await until(lambda: len(parts_of(stream.messages)) == 3)
        await stream.leave()
        return [[(handle, news.token_ids) for handle, news in parts] for parts in stream.messages]

    first, second = run(scenario)
    assert first == [(1, [72])]
    assert sorted(second) == [(1, list(range(73, 83))), (2, list(range(73, 83)))]


def test_a_generation_ends_with_its_completion_and_a_handle_is_free_then(link):
    async def scenario():
        stream = Stream(link)
        for number in range(3):
            stream.start(7, request_id="again")
            await until(lambda number=number: len(link.submissions) == number + 1)
            link.end(number + 1)
            await until(lambda number=number: kinds(stream.messages).count("SampleEnd") > number)
        stream.end_own_side()
        await stream.ended()
        return stream.messages

    messages = run(scenario)
    assert kinds(messages) == ["Header", "SampleEnd"] * 3
    assert {handle for handle, _ in parts_of(messages)} == {7}


def test_what_lives_goes_on_when_the_caller_has_no_more_to_say(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.end_own_side()
        stream.tokens(0)
        await until(lambda: stream.messages)
        link.end(1)
        await stream.ended()
        return stream.messages

    assert kinds(run(scenario)) == ["OutputDelta", "SampleEnd"]


def test_whoever_leaves_takes_back_all_that_lives(link):
    async def scenario():
        stream = Stream(link)
        for handle in (1, 2, 3):
            stream.start(handle, request_id=str(handle))
        await stream.all_submitted(3)
        await stream.leave()
        await stream.service.drain()
        return sorted(link.cancels)

    assert run(scenario) == [(1, None), (2, None), (3, None)]


def test_a_failure_ends_one_generation_only(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        stream.start(2, text="")
        stream.order(Start(3, _refuse, None))
        stream.order(Start(4, lambda: 1 / 0, None))
        await until(lambda: len(errors(stream.messages)) == 3 and link.submissions)
        stream.tokens(0)
        link.end(1)
        await until(lambda: "SampleEnd" in kinds(stream.messages))
        await stream.leave()
        return stream.messages

    def _refuse():
        raise InvalidRequestError("NO", "no")

    messages = run(scenario)
    assert errors(messages) == {2: "EMPTY_PROMPT", 3: "NO", 4: "INTERNAL"}
    assert [type(news) for handle, news in parts_of(messages) if handle == 1] == [
        Header,
        OutputDelta,
        SampleEnd,
    ]


def test_a_cancel_ends_a_generation_with_a_failure_and_frees_its_place(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.cancel(1)
        # One that has ended, or never was, is not minded.
        stream.cancel(1)
        stream.cancel(99)
        await until(lambda: stream.messages)
        await stream.service.drain()
        stream.end_own_side()
        await stream.ended()
        return stream.messages, link.cancels

    messages, cancels = run(scenario)
    assert errors(messages) == {1: "CANCELLED"}
    assert len(parts_of(messages)) == 1
    assert cancels == [(1, None)]


def test_a_generation_that_is_taken_back_before_its_first_step_is_told_so(link):
    async def scenario():
        stream = Stream(link)
        # Both orders are carried out in one turn of the loop.
        stream.many._start(Start(5, lambda: GenerateInput(text="x"), None))
        stream.many._take_back(5, UnavailableError("WHY", "because"))
        await until(lambda: stream.messages)
        stream.end_own_side()
        await stream.ended()
        return stream.messages

    assert errors(run(scenario)) == {5: "WHY"}
    assert not link.submissions


def test_two_that_share_a_handle_are_both_ended(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1, request_id="a")
        stream.start(2, request_id="b")
        await stream.all_submitted(2)
        stream.start(1, request_id="c")
        await until(lambda: errors(stream.messages))
        stream.tokens(1)
        await until(lambda: "OutputDelta" in kinds(stream.messages))
        # It is free now.
        stream.start(1, request_id="d")
        await until(lambda: len(link.submissions) == 3)
        await stream.leave()
        return stream.messages

    assert errors(run(scenario)) == {1: "HANDLE_IN_USE"}
    assert [submission.request_id for submission in link.submissions] == ["a", "b", "d"]


def test_a_message_that_belongs_to_no_generation_ends_the_stream(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.order(InvalidRequestError("MALFORMED_MESSAGE", "what is this"))
        with pytest.raises(InvalidRequestError) as caught:
            await stream.ended()
        return caught.value.reason, link.cancels

    assert run(scenario) == ("MALFORMED_MESSAGE", [(1, None)])


def test_an_end_tells_what_is_ready_and_then_why(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.reads.clear()
        stream.tokens(0)
        await stream.blocked.wait()
        link.end(1)
        stream.many.end(UnavailableError("DRAINING", "over"))
        stream.reads.set()
        with pytest.raises(UnavailableError):
            await stream.ended()
        return stream.messages

    assert kinds(run(scenario)) == ["OutputDelta"]


def test_a_draining_gateway_refuses_starts_and_lets_run_what_runs(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        draining = asyncio.create_task(stream.service.drain())
        await asyncio.sleep(0)
        stream.start(2)
        await until(lambda: errors(stream.messages))
        assert not draining.done()
        link.end(1)
        await draining
        await until(lambda: "SampleEnd" in kinds(stream.messages))
        await stream.leave()
        return stream.messages

    assert errors(run(scenario)) == {2: "DRAINING"}


def test_an_output_that_has_no_encoding_ends_its_generation(link):
    def encode(handle, news):
        if isinstance(news, OutputDelta):
            raise ResourceExhaustedError("OUTPUT_TOO_LARGE", "too large")
        return handle, news

    async def scenario():
        stream = Stream(link, encode=encode)
        stream.start(1)
        await stream.all_submitted(1)
        stream.tokens(0)
        await until(lambda: stream.messages)
        await stream.leave()
        return stream.messages

    assert errors(run(scenario)) == {1: "OUTPUT_TOO_LARGE"}
    assert (1, None) in link.cancels


def test_a_caller_that_reads_nothing_is_not_read_from(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.reads.clear()
        stream.tokens(0)
        await stream.blocked.wait()
        for handle in range(2, 100):
            stream.start(handle, text="")
        for _ in range(500):
            await asyncio.sleep(0)
        num_waiting = stream.sent.qsize()
        stream.reads.set()
        await until(lambda: len(errors(stream.messages)) == 98)
        await stream.leave()
        return num_waiting

    # One was in the reader's hand.
    assert run(scenario) == 97


def test_all_that_live_are_given_up_when_their_caller_reads_nothing_for_long(link):
    async def scenario():
        stream = Stream(link, unread_s=0.0)
        for handle in (1, 2, 3):
            stream.start(handle, request_id=str(handle))
        await stream.all_submitted(3)
        stream.reads.clear()
        stream.tokens(0)
        await stream.blocked.wait()
        # Its own output is with the writer, and what comes now waits.
        stream.tokens(0, 1, 2)
        await until(lambda: len(link.cancels) == 3)
        # Their places are free although nobody has heard of it yet.
        await stream.service.drain()
        assert errors(stream.messages) == {}
        stream.reads.set()
        await until(lambda: len(errors(stream.messages)) == 3)
        stream.end_own_side()
        await stream.ended()
        return stream.messages

    reasons = errors(run(scenario))
    assert reasons == dict.fromkeys((1, 2, 3), "OUTPUT_NOT_READ")


def test_one_that_is_still_being_prepared_is_given_up_too(link):
    async def scenario():
        stream = Stream(link, unread_s=0.0)
        stream.start(1)
        await stream.all_submitted(1)
        prepared = asyncio.Event()

        async def prepare(_request, _parent):
            await prepared.wait()

        stream.service.start = prepare
        stream.start(2)
        await until(lambda: 2 in stream.many._starting)
        stream.reads.clear()
        stream.tokens(0)
        await stream.blocked.wait()
        await until(lambda: link.cancels)
        stream.reads.set()
        await until(lambda: len(errors(stream.messages)) == 2)
        stream.end_own_side()
        await stream.ended()
        return stream.messages

    assert errors(run(scenario)) == dict.fromkeys((1, 2), "OUTPUT_NOT_READ")


def test_one_that_is_cancelled_by_name_while_it_is_prepared_does_not_wait_for_tokens(link):
    async def scenario():
        stream = Stream(link)
        start = stream.service.start

        async def cancelled_meanwhile(request, parent):
            running = await start(request, parent)
            stream.service.cancel(request.tenant, "named")
            return running

        stream.service.start = cancelled_meanwhile
        stream.start(1, request_id="named")
        await until(lambda: errors(stream.messages))
        await stream.leave()
        return stream.messages

    messages = run(scenario)
    assert kinds(messages) == ["Header", "CancelledError"]
    assert link.cancels == [(1, None)]


def test_one_that_its_caller_takes_back_counts_as_cancelled(link):
    async def scenario():
        stream = Stream(link)
        stream.start(1)
        await stream.all_submitted(1)
        stream.cancel(1)
        await until(lambda: errors(stream.messages))
        stream.start(2)
        await until(lambda: len(link.submissions) == 2)
        await stream.leave()
        return list(stream.service.readings())

    counted = [reading for reading in run(scenario) if reading.metric is REQUESTS]
    outcomes = {reading.labels[1]: reading.value for reading in counted}
    assert outcomes == {"cancelled": 1, "client_gone": 1}


def test_a_caller_that_reads_is_not_given_up(link):
    async def scenario():
        stream = Stream(link, unread_s=0.0)
        stream.start(1)
        await stream.all_submitted(1)
        for number in range(20):
            stream.tokens(0)
            await until(lambda number=number: len(stream.messages) == number + 1)
        assert link.cancels == []
        link.end(1)
        stream.end_own_side()
        with contextlib.suppress(PageframeError):
            await stream.ended()
        return stream.messages

    assert kinds(run(scenario))[-1] == "SampleEnd"
