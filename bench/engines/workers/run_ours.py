"""Pageframe in one process: gateway's service, scheduler and executor without the wire."""

import asyncio
import os
import tempfile
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

from protocol import serve

from pageframe.cli.services import count_threads
from pageframe.config.launch import Launch
from pageframe.config.settings import load_settings
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.output import OutputDelta
from pageframe.gateway.request import GenerateInput
from pageframe.lab.in_process import in_process_system
from pageframe.telemetry.logs import configure


class Engine:
    """The in-process system; called from a thread beside the event loop that it runs on."""

    def __init__(self, service: GenerationService, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop

    def versions(self) -> dict[str, str]:
        facts = self._service.facts
        return {"pageframe": "in one process", "dtype": facts.dtype, "runner": facts.runner}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        running = asyncio.run_coroutine_threadsafe(self._run(requests, temperature, n), self._loop)
        return running.result()

    async def _run(
        self, requests: list[dict[str, Any]], temperature: float, n: int
    ) -> list[list[int]]:
        return await asyncio.gather(*(self._one(request, temperature, n) for request in requests))

    async def _one(self, request: dict[str, Any], temperature: float, n: int) -> list[int]:
        asked = GenerateInput(
            token_ids=request["prompt_token_ids"],
            max_tokens=request["num_output_tokens"],
            sampling=SamplingParams(temperature=temperature, ignore_eos=True),
            num_samples=n,
            delivery=Delivery.FINAL,
        )
        lengths = [0] * n
        async with aclosing(self._service.generate(asked)) as outputs:
            async for output in outputs:
                if isinstance(output, OutputDelta):
                    lengths[output.sample_index] += len(output.token_ids)
        return lengths


async def _main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pageframe-bench-")))
        flags = {name: os.environ[f"ENGINE_{name.upper()}"] for name in ("model", "dtype")}
        settings = load_settings({**flags, "state-dir": str(folder)}, os.environ)
        configure("pageframe-bench", "warning")
        launch = Launch(
            settings=settings,
            model_path=Path(flags["model"]),
            run_dir=folder,
            num_threads=count_threads(settings, os.environ),
            supervisor_pid=os.getpid(),
        )
        async with in_process_system(launch, NullTraceSink()) as service:
            await asyncio.to_thread(serve, Engine(service, asyncio.get_running_loop()))


if __name__ == "__main__":
    asyncio.run(_main())
