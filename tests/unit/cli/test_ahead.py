"""The executor that is started ahead; real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from pageframe.cli import ahead as ahead_module
from pageframe.cli.ahead import started_ahead
from pageframe.cli.child import Child, ServiceSpec
from pageframe.cli.console import PlainConsole
from pageframe.cli.supervisor import Supervisor
from unit.cli.test_supervisor import is_running

# Says its whole standard input, then reports as a service does, and ends.
LISTENER = """
import json, os, sys
told = sys.stdin.read()
print("told", told, flush=True)
if told:
    report = {"ready": {"address": "here", "details": {}}}
    os.write(int(os.environ["PAGEFRAME_READY_FD"]), (json.dumps(report) + "\\n").encode())
"""


@pytest.fixture
def listener(monkeypatch):
    """Instead of an executor."""
    started = []

    def command(*words):
        started.append(words)
        return (sys.executable, "-c", LISTENER)

    monkeypatch.setattr(ahead_module, "module_command", command)
    return started


def spec_of(name, tmp_path, code="import sys; sys.exit(9)"):
    return ServiceSpec(
        name=name,
        argv=(sys.executable, "-c", code),
        environ=dict(os.environ),
        log_path=tmp_path / f"{name}.log",
        stop_timeout_seconds=1.0,
    )


@pytest.mark.parametrize(
    "arguments", [[], ["serve", "executor"], ["up", "--help"], ["generate", "up"], ["--help", "up"]]
)
def test_only_a_command_that_serves_has_an_executor_started(arguments, listener):
    with started_ahead(arguments, os.environ) as ahead:
        assert ahead is None
    assert listener == []


def test_it_is_an_executor_that_will_be_told_its_launch_file(listener):
    with started_ahead(["up"], os.environ):
        pass
    assert listener == [("pageframe.executor", "--settings", "-")]


def test_it_has_ended_behind_the_block_whatever_happens(listener):
    seen = []

    def interrupted():
        with started_ahead(["up"], os.environ) as ahead:
            seen.append((ahead.spawned.process, ahead.spawned.process.poll()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ((process, status_in_the_block),) = seen
    assert status_in_the_block is None
    assert process.returncode == -signal.SIGKILL


def test_what_cannot_be_started_ahead_is_left_to_the_supervisor(monkeypatch):
    monkeypatch.setattr(ahead_module, "module_command", lambda *_: ("/nowhere/python",))
    with started_ahead(["up"], os.environ) as ahead:
        assert ahead is None


def test_settings_are_not_in_its_environment(listener, monkeypatch):
    code = "import os; print(sorted(name for name in os.environ if 'PAGEFRAME' in name))"
    monkeypatch.setattr(ahead_module, "module_command", lambda *_: (sys.executable, "-c", code))
    environ = {"PAGEFRAME_DTYPE": "fp32", "PAGEFRAME_MODELS_DIR": "/m", "PATH": os.environ["PATH"]}
    with started_ahead(["up"], environ) as ahead:
        assert ahead is not None
        assert ahead.spawned.process.stdout is not None
        said = ahead.spawned.process.stdout.read().decode().strip()
    assert said == "['PAGEFRAME_MODELS_DIR', 'PAGEFRAME_READY_FD']"


def test_a_supervisor_takes_it_for_the_first_run_of_its_service(listener, tmp_path):
    path = tmp_path / "l\u00e4unch.json"
    reports = {}

    async def run(ahead):
        supervisor = Supervisor(
            [spec_of("executor", tmp_path)],
            console=PlainConsole(sys.stderr),
            on_ready=reports.update,
            backoff_first_seconds=0.01,
            started={"executor": ahead.spawned},
        )
        return await supervisor.run()

    with started_ahead(["up"], os.environ) as ahead:
        ahead.tell(path)
        # The second run is that of the spec, which ends before it is ready.
        assert asyncio.run(run(ahead)) == 1
    assert reports["executor"].address == "here"
    assert f"told {path}" in (tmp_path / "executor.log").read_text()


def test_one_that_has_ended_can_be_told_and_whoever_waits_hears_of_it(tmp_path, monkeypatch):
    code = "import sys; sys.exit('out of luck')"
    monkeypatch.setattr(ahead_module, "module_command", lambda *_: (sys.executable, "-c", code))

    async def run(ahead):
        child = Child.start(
            spec_of("executor", tmp_path), lambda *_: None, lambda _: None, ahead.spawned
        )
        await child.exited
        return child.ready.exception()

    with started_ahead(["up"], os.environ) as ahead:
        ahead.spawned.process.wait()
        ahead.tell(tmp_path / "launch.json")
        error = asyncio.run(run(ahead))
    assert "ended with exit code 1 before it was ready" in error.message
    assert error.message.endswith("out of luck")


def test_it_does_not_outlive_a_command_that_is_killed(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pageframe.cli import ahead\n"
        "deaf = 'import signal; signal.pause()'\n"
        "ahead.module_command = lambda *_: (sys.executable, '-c', deaf)\n"
        "with ahead.started_ahead(['up'], os.environ) as started:\n"
        "    print(started.spawned.process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    # The kernel has signalled it before its parent could be waited for; it may still be ending.
    deadline_s = time.monotonic() + 60
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline_s


def test_an_interrupt_while_the_command_is_still_imported_is_one_line():
    code = (
        "import importlib.abc, sys\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'pageframe.cli.commands':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['pageframe', 'up']\n"
        "from pageframe.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "pageframe: interrupted\n")
