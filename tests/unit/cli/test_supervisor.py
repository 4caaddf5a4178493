"""The supervisor over tiny services: start, fail, crash, drain, and nothing left behind."""

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from pageframe.cli.child import ReadyReport, ServiceSpec
from pageframe.cli.console import PlainConsole
from pageframe.cli.supervisor import NUM_RESTARTS_PER_MINUTE_MAX, Supervisor

FAKE_SERVICE = Path(__file__).with_name("fake_service.py")
PATIENCE_SECONDS = 60.0


class Stage:
    """Specs, journal, console and supervisor of one test."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.journal = tmp_path / "journal"
        self.journal.touch()
        self.stderr = io.StringIO()
        self.reports: Mapping[str, ReadyReport] = {}

    def spec(self, name: str, behaviour: str = "serve", stop_seconds: float = 30.0) -> ServiceSpec:
        return ServiceSpec(
            name=name,
            argv=(sys.executable, str(FAKE_SERVICE), behaviour, name, str(self.journal)),
            environ=dict(os.environ),
            log_path=self.folder / f"{name}.log",
            stop_timeout_seconds=stop_seconds,
        )

    def run(self, *specs: ServiceSpec, then: Callable[[], Awaitable[None]] | None = None) -> int:
        """Supervise until it ends; once all are ready, ``then`` acts."""

        async def scenario() -> int:
            acting: list[asyncio.Task[None]] = []

            def on_ready(reports: Mapping[str, ReadyReport]) -> None:
                self.reports = dict(reports)
                if then is not None:
                    acting.append(asyncio.ensure_future(then()))  # type: ignore[arg-type]

            console = PlainConsole(self.stderr)
            supervisor = Supervisor(
                specs, console=console, on_ready=on_ready, backoff_first_seconds=0.01
            )
            async with asyncio.timeout(PATIENCE_SECONDS):
                code = await supervisor.run()
                await asyncio.gather(*acting)
            return code

        return asyncio.run(scenario())

    def events(self, kind: str) -> list[str]:
        """Names of the services to which it happened, in order."""
        lines = [line.split() for line in self.journal.read_text().splitlines()]
        return [name for name, event, *_ in lines if event == kind]

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"(?: |child=)(\d+)", self.journal.read_text())]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Files and processes announce nothing; looking is the only way to know.
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def said(self) -> str:
        return self.stderr.getvalue()


async def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_all_are_ready_and_ctrl_c_drains_in_order(stage: Stage) -> None:
    names = ["gateway", "scheduler", "executor", "exporter"]
    code = stage.run(*(stage.spec(name) for name in names), then=interrupt)
    assert code == 0, stage.said()
    assert {name: report.address for name, report in stage.reports.items()} == {
        name: f"{name}:1234" for name in names
    }
    assert stage.events("stopped") == names, "each drains only after the one before it has ended"
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_sigterm_drains_like_ctrl_c(stage: Stage) -> None:
    async def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(stage.spec("gateway"), then=terminate) == 0
    assert stage.events("stopped") == ["gateway"]


def test_a_failure_before_ready_gives_its_message_and_exit_code(stage: Stage) -> None:
    code = stage.run(stage.spec("gateway"), stage.spec("executor", "fail"))
    assert code == 2, stage.said()
    assert "executor has no luck today" in stage.said()
    assert stage.reports == {}
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_a_crash_before_ready_says_where_to_look(stage: Stage) -> None:
    code = stage.run(stage.spec("executor", "crash"), stage.spec("gateway", "silent"))
    assert code == 1, stage.said()
    assert "executor ended with exit code 3 before it was ready" in stage.said()
    assert str(stage.folder / "executor.log") in stage.said()
    assert "Traceback of a crash" in stage.said()
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_a_program_that_cannot_be_started_is_said(stage: Stage) -> None:
    spec = ServiceSpec(
        name="ghost",
        argv=("/nonexistent/program",),
        environ={},
        log_path=stage.folder / "ghost.log",
        stop_timeout_seconds=1.0,
    )
    assert stage.run(stage.spec("gateway"), spec) == 1
    assert "/nonexistent/program" in stage.said()
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_a_death_after_ready_is_a_restart(stage: Stage) -> None:
    async def wait_then_stop() -> None:
        await stage.until(lambda: "executor" in stage.events("ready"))
        await interrupt()

    code = stage.run(
        stage.spec("gateway"), stage.spec("executor", "dies_once"), then=wait_then_stop
    )
    assert code == 0, stage.said()
    assert stage.events("started").count("executor") == 2
    assert stage.events("started").count("gateway") == 1, "the others are left alone"
    assert "executor ended with exit code 1; restarting" in stage.said()


def test_a_killed_service_is_restarted(stage: Stage) -> None:
    async def kill_wait_stop() -> None:
        await stage.until(lambda: stage.events("ready") == ["executor"])
        os.kill(stage.pids()[0], signal.SIGKILL)
        await stage.until(lambda: stage.events("ready") == ["executor", "executor"])
        await interrupt()

    assert stage.run(stage.spec("executor"), then=kill_wait_stop) == 0
    assert "executor was ended by signal 9; restarting" in stage.said()


def test_a_service_that_keeps_dying_ends_the_system(stage: Stage) -> None:
    code = stage.run(stage.spec("gateway"), stage.spec("executor", "dies"))
    assert code == 1, stage.said()
    assert stage.events("started").count("executor") == NUM_RESTARTS_PER_MINUTE_MAX + 1
    assert "times in a minute" in stage.said()
    assert stage.events("stopped") == ["gateway"], "the others drain"


def test_a_service_that_was_replaced_by_a_newer_one_is_not_brought_back(stage: Stage) -> None:
    assert stage.run(stage.spec("gateway"), stage.spec("scheduler", "replaced")) == 3
    assert stage.events("started").count("scheduler") == 1
    assert "another scheduler serves in the place of this one" in stage.said()


def test_a_service_that_does_not_stop_is_killed(stage: Stage) -> None:
    specs = [stage.spec("gateway", "deaf", stop_seconds=0.2), stage.spec("executor")]
    assert stage.run(*specs, then=interrupt) == 0
    assert "gateway did not stop in time" in stage.said()
    assert stage.events("stopped") == ["executor"]
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_a_second_ctrl_c_kills_at_once(stage: Stage) -> None:
    async def interrupt_twice() -> None:
        await interrupt()
        await stage.until(lambda: "draining" in stage.said())
        await interrupt()

    specs = [stage.spec("gateway", "deaf", stop_seconds=3600.0), stage.spec("executor")]
    assert stage.run(*specs, then=interrupt_twice) == 130
    assert stage.events("stopped") == []
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_ctrl_c_while_loading_ends_everything_as_interrupted(stage: Stage) -> None:
    async def scenario() -> int:
        console = PlainConsole(stage.stderr)
        supervisor = Supervisor(
            [stage.spec("gateway", "silent")], console=console, on_ready=lambda _: None
        )
        running = asyncio.create_task(supervisor.run())
        await stage.until(lambda: stage.events("started") == ["gateway"])
        await interrupt()
        return await running

    assert asyncio.run(scenario()) == 130
    assert not [pid for pid in stage.pids() if is_running(pid)]


def test_what_a_service_started_ends_with_it(stage: Stage) -> None:
    assert stage.run(stage.spec("executor", "parent"), then=interrupt) == 0
    pids = stage.pids()
    assert len(set(pids)) == 2
    asyncio.run(stage.until(lambda: not [pid for pid in pids if is_running(pid)]))


def test_progress_and_warnings_are_shown_and_logs_are_kept(stage: Stage) -> None:
    async def wait_then_stop() -> None:
        await stage.until(lambda: "low_blocks" in stage.said())
        await interrupt()

    specs = [stage.spec("gateway", "warns"), stage.spec("executor", "loads")]
    assert stage.run(*specs, then=wait_then_stop) == 0
    assert "executor: loading weights 50%" in stage.said()
    assert "gateway: warning: low_blocks free=3" in stage.said()
    assert "quiet" not in stage.said()
    assert "quiet" in (stage.folder / "gateway.log").read_text()


def test_killing_the_supervisor_leaves_nothing(stage: Stage) -> None:
    """SIGKILL gives the supervisor no chance to clean up; the kernel ends its children."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(FAKE_SERVICE.parent)!r})
        import pathlib
        from test_supervisor import Stage
        stage = Stage(pathlib.Path({str(stage.folder)!r}))
        stage.run(stage.spec("gateway", "deaf"), stage.spec("executor"))
    """)
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    try:
        asyncio.run(stage.until(lambda: len(stage.events("ready")) == 2))
    finally:
        supervisor.kill()
        supervisor.wait()
    pids = stage.pids()
    assert len(set(pids)) == 2
    asyncio.run(stage.until(lambda: not [pid for pid in pids if is_running(pid)]))
