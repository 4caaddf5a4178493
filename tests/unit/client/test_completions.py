"""Completions over a stream of many: nothing is looked at before the end, and nothing is lost."""

import asyncio
import threading

from pageframe.client import GenerationRequest
from pageframe.client.many import _Inbox
from pageframe.core.errors import UnavailableError
from unit.client.played_gateway import delta, end, header, playing_many, run

REQUEST = GenerationRequest(prompt="x")
GONE = UnavailableError("DRAINING", "gone")


def test_a_completion_is_woken_once_and_not_for_each_token(monkeypatch):
    taken = []

    async def counting_take(inbox):
        taken.append(await take(inbox))
        return taken[-1]

    take = _Inbox.take
    monkeypatch.setattr(_Inbox, "take", counting_take)
    # The gateway goes on only when what came before was read: each delta comes by itself.
    is_read, script = threading.Event(), [header(), delta("a", 1)]
    script += [is_read, delta("b", 2), end(2)]

    async def scenario(client):
        completion = asyncio.create_task(client.complete(REQUEST))
        inbox = await _inbox_of(client)
        while len(inbox._parts) < 2:  # noqa: ASYNC110 - turns of the loop, not time
            await asyncio.sleep(0)
        is_read.set()
        return await completion

    with playing_many(script) as (_, address):
        result = run(address, scenario)
    assert result.samples[0].token_ids == [1, 2]
    assert [len(parts) for parts in taken] == [4, 0]


async def _inbox_of(client):
    while not (stream := client._many._stream) or not stream._living:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return next(iter(stream._living.values()))


def test_a_completion_resumes_with_what_had_come_before_its_stream_broke():
    broken = [header(seed=9), delta("a", 1), delta("b", 2), (GONE,)]
    rest = [header(seed=9), delta("c", 3), end(3)]
    with playing_many(broken, rest) as (gateway, address):
        result = run(address, lambda client: client.complete(REQUEST))
        orders = [gateway.orders.get(timeout=20) for _ in range(2)]
    assert result.samples[0].token_ids == [1, 2, 3]
    assert list(orders[1].start.request.resume_outputs[0].token_ids) == [1, 2]
