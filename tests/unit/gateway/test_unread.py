"""A caller that reads nothing keeps no place for ever, and hears why when it reads again."""

import asyncio
import contextlib

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import ResourceExhaustedError
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.output import SampleEnd
from pageframe.gateway.unread import ReadWatch
from pageframe.rpc.auth import Authenticator
from unit.gateway.driving import collect, start


class Loop:
    """Time and timers of an event loop, by hand."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        self.timers = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def time(self):
        return self.now_s

    def call_later(self, delay_s, call):
        handle = Timer(self.now_s + delay_s, call)
        self.timers.append(handle)
        return handle

    def pass_time(self, seconds):
        self.now_s += seconds
        due = [timer for timer in self.timers if timer.at_s <= self.now_s]
        self.timers = [timer for timer in self.timers if timer.at_s > self.now_s]
        for timer in due:
            if not timer.is_cancelled:
                timer.call()


class Timer:
    def __init__(self, at_s, call):
        self.at_s, self.call, self.is_cancelled = at_s, call, False

    def cancel(self):
        self.is_cancelled = True


@pytest.fixture
def watched(monkeypatch):
    """A loop, a watch of ten seconds, and when it gave up."""
    loop, given_up = Loop(monkeypatch), []
    return loop, ReadWatch(10.0, lambda: given_up.append(loop.now_s)), given_up


def test_patience_is_counted_from_the_output_that_is_not_taken(watched):
    loop, watch, given_up = watched
    watch.offer()
    loop.pass_time(4)
    watch.taken()
    watch.offer()
    loop.pass_time(6)
    assert given_up == []
    loop.pass_time(4)
    assert given_up == [14]


def test_whoever_waits_for_the_model_is_not_blamed(watched):
    loop, watch, given_up = watched
    watch.offer()
    watch.taken()
    loop.pass_time(100)
    assert given_up == []
    assert loop.timers == [], "nothing is watched, and nothing set again"
    watch.offer()
    loop.pass_time(10)
    assert given_up == [110]


def test_many_outputs_need_one_timer(watched):
    loop, watch, _ = watched
    for _ in range(100):
        watch.offer()
        watch.taken()
    assert len(loop.timers) == 1


def test_a_watch_that_was_closed_gives_nobody_up(watched):
    loop, watch, given_up = watched
    watch.offer()
    watch.close()
    loop.pass_time(100)
    assert given_up == []


def make_service(link):
    return GenerationService(
        link, CodecStore(), Authenticator({}), ManualClock(5), NullTraceSink(), unread_s=0.0
    )


def hear_cancels(link):
    """An event for the first of them."""
    heard, cancel = asyncio.Event(), link.cancel

    def tell(handle, sample_index=None):
        cancel(handle, sample_index)
        heard.set()

    link.cancel = tell
    return heard


def test_a_request_that_nobody_reads_gives_its_places_back_and_ends_with_a_typed_error(link):
    async def scenario():
        service, cancelled = make_service(link), hear_cancels(link)
        outputs, _, following = await start(service, request_id="r")
        async with contextlib.aclosing(outputs):
            link.mailboxes[0].put_tokens(0, [5])
            await following
            # The door is busy with that output, and the timer is due.
            await cancelled.wait()
            assert link.cancels == [(1, None)]
            # Its name and its place are free: this would be refused else, or wait.
            await service.drain()
            with pytest.raises(ResourceExhaustedError) as caught:
                await anext(outputs)
            assert caught.value.reason == "OUTPUT_NOT_READ"

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_who_reads_the_last_output_late_has_lost_nothing(link):
    async def scenario():
        service, cancelled = make_service(link), hear_cancels(link)
        outputs, _, following = await start(service)
        link.mailboxes[0].put_tokens(0, [5])
        link.end(1)
        await following
        await cancelled.wait()
        return await collect(outputs)

    (end,) = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert isinstance(end, SampleEnd)
