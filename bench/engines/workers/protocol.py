"""The worker's side of a measurement; the standard library only, for any engine's environment.

A worker is a process of its own that reads one JSON object a line and answers with one:

    {"requests": [...], "temperature": 0.0, "num_samples": 1}
    {"wall_s": 1.25, "lengths": [[...], ...]}

Its first line says that it is ready. Whatever an engine prints goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any, Protocol


class Engine(Protocol):
    """What a worker drives."""

    def versions(self) -> dict[str, str]:
        """Packages and settings, for the record."""
        ...

    def run(self, requests: list[dict[str, Any]], temperature: float, n: int) -> list[list[int]]:
        """Do all ``requests`` at once; how many tokens each sample of each request got."""
        ...


def serve(engine: Engine) -> None:
    """Answer until standard input ends."""
    print(json.dumps({"versions": engine.versions()}), file=_ANSWERS, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        lengths = engine.run(order["requests"], order["temperature"], order["num_samples"])
        wall_s = time.perf_counter() - started
        print(json.dumps({"wall_s": wall_s, "lengths": lengths}), file=_ANSWERS, flush=True)


def _keep_answers_apart() -> Any:
    """Standard output as it was; from now on everybody else's goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


_ANSWERS = _keep_answers_apart()
