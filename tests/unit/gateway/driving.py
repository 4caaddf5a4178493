"""Driving one generation against a scheduler that does what the test says."""

import asyncio
import contextlib

from pageframe.core.clock import ManualClock
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.tokenizer import TextCodec
from pageframe.rpc.auth import Authenticator


def make_service(link, sink=None):
    return GenerationService(
        link, CodecStore(), Authenticator({}), ManualClock(5), sink or NullTraceSink()
    )


async def next_output(outputs):
    return await asyncio.wait_for(anext(outputs), 10)


async def collect(outputs):
    async with contextlib.aclosing(outputs):
        return [output async for output in outputs]


async def start(service, **fields):
    """A generation behind its header, and submitted."""
    outputs = service.generate(GenerateInput(**({"text": "the dog"} | fields)))
    header = await next_output(outputs)
    following = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0)
    return outputs, header, following


async def abandon(outputs, following):
    """Go away, as a handler does that is cancelled."""
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    await outputs.aclose()


def encode(model_folder, text):
    return TextCodec.load(model_folder).encode(text)
