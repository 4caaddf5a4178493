"""The server that `pageframe bench` starts is the one that was asked for, and it is stopped."""

import io
import json
import os
import signal
import subprocess

import pytest
import structlog

from pageframe.cli import bench
from pageframe.cli import up as up_module
from pageframe.cli.main import main
from pageframe.config.option_types import LogLevel
from pageframe.config.settings import load_settings
from pageframe.core.errors import UnavailableError
from pageframe.lab.bench_split import Round, SplitReport


class PlayedProcess:
    """What ``Popen`` gives back: says a line, and ends at once or not at all."""

    def __init__(self, said="pageframe ready grpc=127.0.0.1:5\n", *, is_stubborn=False):
        self.stdout = io.StringIO(said)
        self.pid = os.getpid()
        self.command = []
        self.signals = []
        self.is_stubborn = is_stubborn

    def __call__(self, command, **options):
        self.command = command
        return self

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.signals.append(signal.SIGKILL)

    def wait(self, timeout=None):
        if self.is_stubborn and signal.SIGKILL not in self.signals:
            raise subprocess.TimeoutExpired(self.command, timeout)


@pytest.fixture
def play(monkeypatch):
    def play(*arguments, **options):
        process = PlayedProcess(*arguments, **options)
        monkeypatch.setattr(bench.subprocess, "Popen", process)
        return process

    return play


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"runner": "sim", "sim-step": "2ms", "lookahead": "off", "kv-memory": "2GiB"},
        {"http": "127.0.0.1:0", "drain-timeout": "250ms", "block-size": "32", "trace": "off"},
    ],
)
def test_the_server_is_started_with_the_settings_of_the_measurement(
    play, flags, monkeypatch, tmp_path
):
    settings = load_settings(flags | {"state-dir": str(tmp_path)}, {}, working_dir=tmp_path)
    process = play()
    with bench._three_processes(settings) as (address, _):
        assert address == "127.0.0.1:5"
    started = []

    def run_up(settings, environ, console, ahead=None):
        started.append(settings)
        return 0

    monkeypatch.setattr(up_module, "run_up", run_up)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(process.command[process.command.index("up") :])
    assert started == [settings]


def test_the_server_is_stopped_whatever_happens(play):
    process = play()
    with pytest.raises(ZeroDivisionError), bench._three_processes(load_settings({}, {})):
        raise ZeroDivisionError
    assert process.signals == [signal.SIGINT]


def test_a_server_that_does_not_stop_is_killed(play):
    process = play(is_stubborn=True)
    with bench._three_processes(load_settings({}, {})):
        pass
    assert process.signals == [signal.SIGINT, signal.SIGKILL]


def test_a_server_that_does_not_start_is_named_and_reaped(play):
    process = play("")
    with pytest.raises(UnavailableError) as caught, bench._three_processes(load_settings({}, {})):
        raise AssertionError("it never was ready")
    assert caught.value.reason == "NOT_READY"
    assert process.signals == [signal.SIGINT]


@pytest.mark.usefixtures("restored_logging")
def test_the_one_process_logs_as_a_service_does_while_it_is_measured(tmp_path, capsys):
    log = structlog.get_logger()
    path = tmp_path / "log"
    with bench._logs_in(path, LogLevel.INFO):
        log.info("generate", num_output_tokens=7)
    log.info("nobody")
    log.warning("trouble")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["generate"]
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == [
        "trouble"
    ]


def test_the_report_of_a_person_names_ratio_and_services(capsys):
    rounds = [Round(split_tokens_per_s=80.0, single_tokens_per_s=100.0)]
    bench._print_report(SplitReport(rounds=rounds, cpu_us_per_token={"gateway": 12.34}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ratio 0.800"
    assert lines[1].split()[:3] == ["gateway", "12.3", "us"]
