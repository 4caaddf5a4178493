"""Several generations at once: one for each prompt of a request, their outputs in one stream."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from pageframe.gateway.generation import GenerationService
from pageframe.gateway.output import Output
from pageframe.gateway.request import GenerateInput
from pageframe.telemetry.context import TraceContext


async def generate_all(
    service: GenerationService, inputs: Sequence[GenerateInput], parent: TraceContext | None
) -> AsyncGenerator[tuple[int, Output], None]:
    """Run them; yields outputs with the index of their prompt, as they come.

    If one fails all others are taken back. Close the iterator to take all of them back.

    Raises:
        PageframeError: what the first to fail raised.
    """
    if len(inputs) == 1:
        # Nearly always: then no queue stands between tokens and their caller.
        async with contextlib.aclosing(service.generate(inputs[0], parent)) as generation:
            async for output in generation:
                yield 0, output
        return
    # One place: whoever is ahead of the reader waits, and its tokens merge meanwhile.
    outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue(1)

    async def run(index: int) -> None:
        async with contextlib.aclosing(service.generate(inputs[index], parent)) as generation:
            async for output in generation:
                await outputs.put((index, output))

    runs = [asyncio.create_task(run(index)) for index in range(len(inputs))]
    try:
        async for item in _until_done(runs, outputs):
            yield item
    finally:
        for task in runs:
            task.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def _until_done(
    runs: Sequence[asyncio.Task[None]], outputs: "asyncio.Queue[tuple[int, Output]]"
) -> AsyncGenerator[tuple[int, Output], None]:
    """What comes out of the queue until all runs have ended; an error comes out at once."""
    running = set(runs)
    while running or not outputs.empty():
        getting = asyncio.ensure_future(outputs.get())
        try:
            done, _ = await asyncio.wait({getting, *running}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {getting}:
                running.discard(task)
                task.result()
            if getting.done():
                yield getting.result()
        finally:
            getting.cancel()
