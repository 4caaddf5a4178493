"""What a newcomer meets in the first ten minutes: it works, or one line says the way out."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pageframe.cli.run_folder import SOCKET_PATH_BYTES_MAX

PAGEFRAME = Path(sys.executable).with_name("pageframe")
READY = re.compile(r"pageframe ready grpc=127\.0\.0\.1:(\d+)( \w+=\S+)*\n")
PATIENCE_SECONDS = 120.0


def environment(**changed: str) -> dict[str, str]:
    """This process's environment, without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PAGEFRAME_")}
    if "PAGEFRAME_MODELS_DIR" in os.environ:
        kept["PAGEFRAME_MODELS_DIR"] = os.environ["PAGEFRAME_MODELS_DIR"]
    return kept | changed


def refusal(tmp_path: Path, *arguments: str, **variables: str) -> str:
    """The one line of a ``pageframe up`` that must not start anything."""
    command = [str(PAGEFRAME), "up", "--state-dir", str(tmp_path / "state"), *arguments]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("state/logs/*")), "nothing was started"
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("model: ")]
    return line


class System:
    """A running ``pageframe up`` with the runner that computes nothing."""

    def __init__(self, state_dir: Path, *arguments: str, **variables: str) -> None:
        self.state_dir = state_dir
        command = [str(PAGEFRAME), "up", "--runner", "sim", "--kv-memory", "64MiB"]
        command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--metrics-port", "0"]
        command += ["--state-dir", str(state_dir), *arguments]
        self.stderr = state_dir.parent / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=state_dir.parent,
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        self.services = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def port(self) -> int:
        match = READY.fullmatch(self.ready_line)
        assert match, f"{self.ready_line!r}\n{self.stderr.read_text()}"
        return int(match[1])

    def stop(self, number: signal.Signals) -> int:
        """Signal the supervisor and wait until all is gone; its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_SECONDS)
        _, alive = psutil.wait_procs(self.services, timeout=PATIENCE_SECONDS)
        assert not alive, "no process is left behind"
        return code

    def end(self) -> None:
        """Whatever happened, leave nothing running."""
        for service in self.services:
            with contextlib.suppress(psutil.NoSuchProcess):
                service.kill()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def systems() -> Iterator[list[System]]:
    started: list[System] = []
    yield started
    for system in started:
        system.end()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.model
def test_up_prints_one_line_and_ctrl_c_leaves_nothing(
    tmp_path: Path, systems: list[System]
) -> None:
    system = System(tmp_path / "state")
    systems.append(system)
    assert accepts(system.port), "port 0 has become the port that the line names"
    names = {" ".join(service.cmdline()) for service in system.services}
    for service in ("gateway", "scheduler", "executor", "telemetry"):
        assert any(f"pageframe.{service}" in name for name in names), names
    published = json.loads((tmp_path / "state" / "address.json").read_text())
    assert published["grpc"] == f"127.0.0.1:{system.port}", "client commands find it there"
    assert system.stop(signal.SIGINT) == 0
    assert system.process.stdout is not None
    assert system.process.stdout.read() == "", "the ready line is the last one"
    assert not list((tmp_path / "state" / "run").iterdir()), "sockets and rings are gone"
    assert not (tmp_path / "state" / "address.json").exists()
    assert not accepts(system.port)


@pytest.mark.model
def test_killing_the_supervisor_leaves_nothing(tmp_path: Path, systems: list[System]) -> None:
    system = System(tmp_path / "state")
    systems.append(system)
    assert system.port
    assert system.stop(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.model
def test_a_long_state_path_and_a_proxy_do_not_stand_in_the_way(
    tmp_path: Path, systems: list[System]
) -> None:
    """A Unix socket's path is short, and a proxy must never see what services say."""
    dead_proxy = "http://127.0.0.1:9"
    state_dir = tmp_path / ("long" * (SOCKET_PATH_BYTES_MAX // 4))
    system = System(state_dir, http_proxy=dead_proxy, https_proxy=dead_proxy, grpc_proxy=dead_proxy)
    systems.append(system)
    assert accepts(system.port)
    assert system.stop(signal.SIGTERM) == 0


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        line = refusal(tmp_path, "--grpc", f"127.0.0.1:{port}")
    assert f"port {port}" in line
    assert "--grpc 127.0.0.1:0" in line


def test_an_unknown_setting_is_named_wherever_it_stands(tmp_path: Path) -> None:
    assert "PAGEFRAME_BLOCKSIZE" in refusal(tmp_path, PAGEFRAME_BLOCKSIZE="16")
    (tmp_path / "pageframe.toml").write_text("blocksize = 16\n")
    line = refusal(tmp_path)
    assert "blocksize" in line
    assert "pageframe.toml" in line


def test_a_malformed_setting_is_named(tmp_path: Path) -> None:
    line = refusal(tmp_path, PAGEFRAME_KV_MEMORY="plenty")
    assert "PAGEFRAME_KV_MEMORY" in line
    assert "2GiB" in line


def test_a_model_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    line = refusal(tmp_path, "--model", "./absent", "--grpc", "127.0.0.1:0")
    assert "./absent" in line


def test_a_model_that_generates_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    line = refusal(tmp_path, "--model", "./bert", "--grpc", "127.0.0.1:0")
    assert "no causal language model" in line
    assert "BertForMaskedLM" in line


def test_python_without_assertions_is_refused(tmp_path: Path) -> None:
    assert "PYTHONOPTIMIZE" in refusal(tmp_path, PYTHONOPTIMIZE="1")


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("there is one")
    line = refusal(tmp_path, "--device", "cuda", "--grpc", "127.0.0.1:0")
    assert "--device cpu" in line
