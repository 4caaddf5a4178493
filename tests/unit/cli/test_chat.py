"""`pageframe chat` as a process, by a pipe and by a terminal, against a gateway with a script."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from pageframe.core.errors import ResourceExhaustedError
from unit.client.played_gateway import delta, end, header, playing

MAIN = "from pageframe.cli.main import main; main()"
COMMAND = [sys.executable, "-c", MAIN, "chat"]
SCRIPT = [header(num_prompt_tokens=6), delta("Pa", 3), delta("ris €", 4, 5), end(3)]
PATIENCE_S = 60


def said(request):
    return [(message.role, message.content) for message in request.chat.messages]


def run(*arguments, stdin=b""):
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=PATIENCE_S, check=False
    )


def test_each_line_of_a_pipe_is_a_turn_of_one_session():
    with playing(SCRIPT) as (gateway, address):
        result = run(
            "--server",
            address,
            "--system",
            "Be short.",
            "--seed",
            "7",
            stdin="eins\n\n€?\n".encode(),
        )
    assert (result.returncode, result.stdout.decode()) == (0, "Paris €\nParis €\n"), result.stderr
    first, second = gateway.requests
    system, question = ("system", "Be short."), ("user", "eins")
    assert said(first) == [system, question]
    assert said(second) == [system, question, ("assistant", "Paris €"), ("user", "€?")]
    assert first.session_id == second.session_id != ""
    assert first.sampling.seed == 7


def test_once_takes_one_turn_and_json_tells_all_of_it():
    with playing(SCRIPT) as (gateway, address):
        result = run("--server", address, "--once", "Say", "--json")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.decode().splitlines()
    content = json.loads(line)
    assert content["text"] == "Paris €"
    assert content["finish_reason"] == "length"
    assert content["usage"] == {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 3}
    assert content["trace_id"] == "ab" * 16
    assert content["session_id"] == gateway.requests[0].session_id
    assert 0 <= content["first_token_s"] <= content["elapsed_s"]


def test_a_turn_that_fails_was_not_said_and_the_next_one_is_tried():
    full = ResourceExhaustedError("RATE_LIMITED", "come again in 2 s", retry_after_s="2.000")
    with playing([full], SCRIPT) as (gateway, address):
        result = run("--server", address, stdin=b"one\ntwo\n")
    assert result.returncode == 1
    assert b"RATE_LIMITED: come again in 2 s" in result.stderr
    assert said(gateway.requests[1]) == [("user", "two")]
    assert result.stdout.decode() == "Paris €\n"


def test_with_json_a_failure_is_an_object_too():
    full = ResourceExhaustedError("RATE_LIMITED", "later", retry_after_s="2.000")
    with playing([full]) as (_, address):
        result = run("--server", address, "--once", "Say", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"]["reason"] == "RATE_LIMITED"


def test_where_nobody_answers_it_says_how_to_start_a_server(tmp_path):
    result = run("--server", f"unix:{tmp_path}/nobody.sock", "--once", "Say")
    assert result.returncode == 1
    assert b"start one with `pageframe up`" in result.stderr


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments):
        self._screen, inner = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""

    def appears(self, text, *, patience_s):
        """Whether ``text`` is shown within so many seconds."""
        deadline_s = time.monotonic() + patience_s
        while text not in self.shown:
            left_s = deadline_s - time.monotonic()
            readable, _, _ = select.select([self._screen], [], [], max(0, left_s))
            if not readable:
                return False
            self.shown += os.read(self._screen, 1 << 16).decode()
        return True

    def see(self, text):
        """Wait until ``text`` is shown behind what was seen before; returns what stood before."""
        assert self.appears(text, patience_s=PATIENCE_S), f"{text!r} is not shown: {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self._screen, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, text):
        """Press Ctrl-C until ``text`` is shown, as a person would.

        Between showing its prompt and waiting for keys, readline sees a signal only with the next.
        """
        for _ in range(20):
            self.interrupt()
            if self.appears(text, patience_s=3.0):
                break
        self.see(text)

    def wait(self):
        # What is still shown has to be read, or it could not end.
        with contextlib.suppress(OSError):
            while os.read(self._screen, 1 << 16):
                pass
        return self.process.wait(PATIENCE_S)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:

        def make(*arguments):
            terminal = Terminal(*arguments)
            stack.callback(terminal.close)
            return terminal

        yield make


def test_on_a_terminal_there_is_a_prompt_and_there_are_commands(opened):
    with playing(SCRIPT) as (gateway, address):
        terminal = opened("--server", address)
        terminal.see("you> ")
        terminal.type("/stats\n")
        terminal.see("Nothing was said yet")
        terminal.type("Hello\n")
        terminal.see("Paris €")
        terminal.type("/stats\n")
        terminal.see("3 tokens")
        terminal.see("ab" * 16)
        terminal.type("/sats\n")
        terminal.see("did you mean /stats?")
        terminal.type("/system Be a pirate.\n")
        terminal.see("Begun anew")
        terminal.type("Ahoy\n")
        terminal.see("Paris €")
        terminal.type("/reset\n")
        terminal.see("Forgotten")
        terminal.type("Again\n")
        terminal.see("Paris €")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    assert [said(request) for request in gateway.requests] == [
        [("user", "Hello")],
        [("system", "Be a pirate."), ("user", "Ahoy")],
        [("system", "Be a pirate."), ("user", "Again")],
    ]
    assert len({request.session_id for request in gateway.requests}) == 3


def test_ctrl_c_stops_the_answer_and_not_the_program(opened):
    stopped = threading.Event()

    def endless():
        yield header()
        yield delta("Once upon ", 1)
        # Until the caller has gone away; then the script is closed.
        stopped.wait(PATIENCE_S)
        yield end(1)

    with playing(endless(), SCRIPT) as (gateway, address):
        terminal = opened("--server", address)
        terminal.see("you> ")
        terminal.type("Tell\n")
        terminal.see("Once upon")
        terminal.interrupt()
        terminal.see("(stopped)")
        stopped.set()
        terminal.see("you> ")
        terminal.interrupt_until("Ctrl-D or /quit ends")
        terminal.see("you> ")
        terminal.type("Go on\n")
        terminal.see("Paris €")
        # Keys that are typed before the prompt are not all there when it comes.
        terminal.see("you> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    # What had come of it was said.
    assert said(gateway.requests[1]) == [
        ("user", "Tell"),
        ("assistant", "Once upon "),
        ("user", "Go on"),
    ]
