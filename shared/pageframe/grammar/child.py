"""Reads grammars in a child process: some 800 bytes of schema keep the library busy for ever.

    check(grammar) ──line──▶ child, with a limit on its own computing time and memory
                   ◀──line── fine, or the library's words
                   ◀──end─── it was too much: the child has ended itself

A thread that computes cannot be ended; a process can, and ends by itself when whoever started it
is gone, because its input ends.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from typing import IO

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar
from pageframe.core.limits import LIMITS

# A child may have been ended from outside; the grammar that meets it gets another one.
_NUM_TRIES = 2


class GrammarChild:
    """A child process, started when it is first needed. Any thread may call it; one is served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> None:
        """Refuse what the library cannot follow, or cannot read within its limits.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID, with the library's words, or GRAMMAR_TOO_COMPLEX.
        """
        request = {"form": grammar.form.value, "text": grammar.text}
        with self._lock:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        if not answer:
            seconds = LIMITS.grammar_compute_seconds_max
            raise InvalidRequestError(
                "GRAMMAR_TOO_COMPLEX",
                f"{grammar.form.value} takes more than {seconds:g} s of computing to read, or too "
                "much memory; make it simpler",
                field=grammar.form.value,
                compute_seconds_max=seconds,
            )
        message = json.loads(answer)["message"]
        if message:
            raise InvalidRequestError("GRAMMAR_INVALID", message, field=grammar.form.value)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._child is not None:
                _end(self._child)
            self._child = None

    def _ask(self, line: bytes) -> bytes:
        """The child's answer; empty if it ended over the question."""
        for _ in range(_NUM_TRIES):
            child = self._child = self._child or self._start()
            source, target = _pipes(child)
            try:
                target.write(line)
                target.flush()
                answer = source.readline()
            except BrokenPipeError:
                answer = b""
            if answer:
                return answer
            _end(child)
            self._child = None
            if child.returncode == -signal.SIGPROF:
                break
        return b""

    def _start(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pageframe.grammar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        weakref.finalize(self, _end, child)
        return child


def _pipes(child: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    assert child.stdout is not None, "its output is a pipe"
    assert child.stdin is not None, "its input is a pipe"
    return child.stdout, child.stdin


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for pipe in _pipes(child):
        # A question that it did not hear to the end cannot be flushed.
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
