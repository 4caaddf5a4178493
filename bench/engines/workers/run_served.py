"""Pageframe as it is served: ``pageframe up`` and its client, the three services apart."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import Any

from protocol import serve

from pageframe.client import AsyncPageframeClient, GenerationRequest
from pageframe.core.request import Delivery

_READY_LINE = re.compile(r"pageframe ready grpc=(\S+)")
_STOP_TIMEOUT_S = 30


class Engine:
    """A running system and a client on a loop of this process."""

    def __init__(self, address: str, ready_line: str) -> None:
        self._ready_line = ready_line
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(_connect(address))

    def versions(self) -> dict[str, str]:
        return {"pageframe": "three processes over gRPC", "ready": self._ready_line}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        return self._loop.run_until_complete(self._run(requests, temperature, n))

    async def _run(
        self, requests: list[dict[str, Any]], temperature: float, n: int
    ) -> list[list[int]]:
        return await asyncio.gather(*(self._one(request, temperature, n) for request in requests))

    async def _one(self, request: dict[str, Any], temperature: float, n: int) -> list[int]:
        result = await self._client.complete(
            GenerationRequest(
                token_ids=request["prompt_token_ids"],
                max_tokens=request["num_output_tokens"],
                ignore_eos=True,
                temperature=temperature,
                num_samples=n,
                delivery=Delivery.FINAL,
            )
        )
        return [len(sample.token_ids) for sample in result.samples]


async def _connect(address: str) -> AsyncPageframeClient:
    return await AsyncPageframeClient(address).__aenter__()


def main() -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory(prefix="pageframe-bench-") as folder:
        command = [
            sys.executable,
            "-m",
            "pageframe.cli",
            "up",
            "--grpc=127.0.0.1:0",
            "--http=127.0.0.1:0",
        ]
        command += [f"--state-dir={folder}", "--trace=all"]
        command += [
            f"--{name}={os.environ[f'ENGINE_{name.upper()}']}" for name in ("model", "dtype")
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None, "a pipe was asked for"
            line = process.stdout.readline().strip()
            found = _READY_LINE.match(line)
            if found is None:
                raise SystemExit(f"the server did not start: {line}")
            serve(Engine(found.group(1), line))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_STOP_TIMEOUT_S)


if __name__ == "__main__":
    main()
