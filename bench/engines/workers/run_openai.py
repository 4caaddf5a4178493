"""Any server that speaks OpenAI's HTTP, driven through ``/v1/completions`` with token ids.

ENGINE_COMMAND starts it; ``{port}``, ``{model}`` and ``{dtype}`` in it are filled in. A server that
does not take ``n`` samples of token ids, or that ends early, is told by its wrong lengths. With
ENGINE_USAGE=sample its usage counts the tokens of one sample, as llama.cpp's does, not of all.
"""

import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_START_LIMIT_S = 300.0


class Engine:
    """A server process and one connection per request."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command = command
        self._port = port
        self._process = subprocess.Popen(command, stdout=sys.stderr)
        self._wait()
        self._model = self._call("GET", "/v1/models", None)["data"][0]["id"]

    def versions(self) -> dict[str, str]:
        return {"command": " ".join(self._command)}

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self._one(request, temperature, n), requests))

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(30)

    def _one(self, request: dict[str, Any], temperature: float, n: int) -> list[int]:
        answer = self._call(
            "POST",
            "/v1/completions",
            {
                "model": self._model,
                "prompt": request["prompt_token_ids"],
                "max_tokens": request["num_output_tokens"],
                "min_tokens": request["num_output_tokens"],
                "ignore_eos": True,
                "temperature": temperature,
                "n": n,
            },
        )
        num_samples, num_tokens = len(answer["choices"]), answer["usage"]["completion_tokens"]
        each = (
            num_tokens if os.environ.get("ENGINE_USAGE") == "sample" else num_tokens // num_samples
        )
        return [each] * num_samples

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise RuntimeError(f"{method} {path}: {response.status} {text[:500]!r}")
            return json.loads(text)
        finally:
            connection.close()

    def _wait(self) -> None:
        limit = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < limit and self._process.poll() is None:
            try:
                self._call("GET", "/v1/models", None)
            except (OSError, RuntimeError):
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"the server did not start: {self._command}")


def main() -> None:
    """Serve until standard input ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "port": port,
        "model": os.environ["ENGINE_MODEL"],
        "dtype": os.environ["ENGINE_DTYPE"],
    }
    engine = Engine(
        [part.format(**values) for part in shlex.split(os.environ["ENGINE_COMMAND"])], port
    )
    try:
        serve(engine)
    finally:
        engine.close()


if __name__ == "__main__":
    from protocol import serve

    main()
