"""Where rings lie, and which of them nobody will ever read."""

import os
import subprocess
import sys

import pytest

from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.core.trace import TraceMode
from pageframe.telemetry.ring import RingReader, RingWriter
from pageframe.telemetry.ring_path import remove_dead_rings, ring_path

SERVICES = ("gateway", "scheduler", "executor")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


def make_ring(path):
    return RingWriter(path, service_name="s", mode=TraceMode.ALL, incarnation=1)


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_all_processes_of_a_run_come_to_the_same_path_and_no_two_runs_do(tmp_path, folder):
    runs = [(tmp_path / "a", 1), (tmp_path / "b", 1), (tmp_path / "a", 2)]
    paths = [
        ring_path(run_dir, pid, service, folder=folder)
        for run_dir, pid in runs
        for service in SERVICES
    ]
    assert len(set(paths)) == 9
    assert {path.parent for path in paths} == {folder}
    assert paths[0] == ring_path(tmp_path / "a", 1, "gateway", folder=folder)


def test_without_shared_memory_the_ring_lies_in_the_run_folder(tmp_path):
    path = ring_path(tmp_path, 1, "executor", folder=tmp_path / "not-there")
    assert path == tmp_path / "executor.ring"


@pytest.mark.parametrize("service", [*SERVICES, "scheduler-1", "executor-12"])
def test_the_ring_of_a_killed_run_is_removed(tmp_path, folder, service):
    path = ring_path(tmp_path, dead_pid(), service, folder=folder)
    make_ring(path).close()
    assert remove_dead_rings(folder=folder) == [path]
    assert list(folder.iterdir()) == []


def test_a_ring_stays_while_its_supervisor_lives(tmp_path, folder):
    path = ring_path(tmp_path, os.getpid(), "executor", folder=folder)
    make_ring(path).close()
    assert remove_dead_rings(folder=folder) == []
    assert path.exists()


def test_a_ring_stays_while_its_producer_lives(tmp_path, folder):
    path = ring_path(tmp_path, dead_pid(), "executor", folder=folder)
    writer = make_ring(path)
    assert remove_dead_rings(folder=folder) == []
    writer.close()
    assert remove_dead_rings(folder=folder) == [path]


def test_a_ring_stays_while_an_exporter_reads_it(tmp_path, folder):
    path = ring_path(tmp_path, dead_pid(), "executor", folder=folder)
    make_ring(path).close()
    reader = RingReader(path)
    assert remove_dead_rings(folder=folder) == []
    reader.close()
    assert remove_dead_rings(folder=folder) == [path]


@pytest.mark.parametrize(
    "name",
    [
        "other.ring",
        "pageframe-{uid}-{pid}.ring",
        "pageframe-{uid}-{pid}-0123456789ab-executor.ring.new",
        "pageframe-{uid}1-{pid}-0123456789ab-executor.ring",
    ],
)
def test_files_of_others_are_left_alone(folder, name):
    path = folder / name.format(uid=os.getuid(), pid=dead_pid())
    make_ring(path).close()
    assert remove_dead_rings(folder=folder) == []
    assert path.exists()


def test_what_is_no_ring_is_left_alone(folder):
    path = folder / f"pageframe-{os.getuid()}-{dead_pid()}-0123456789ab-executor.ring"
    path.write_bytes(b"no ring")
    assert remove_dead_rings(folder=folder) == []
    assert path.exists()


def test_a_launch_names_its_rings_and_removes_what_is_left_of_them(tmp_path):
    launch = Launch(
        settings=Settings(),
        model_path=tmp_path,
        run_dir=tmp_path / "run",
        num_threads=1,
        supervisor_pid=os.getpid(),
    )
    paths = [launch.ring_path(service) for service in SERVICES]
    assert paths == [ring_path(tmp_path / "run", os.getpid(), service) for service in SERVICES]
    (tmp_path / "run").mkdir()
    make_ring(paths[0]).close()
    launch.remove_rings(SERVICES)
    assert not any(path.exists() for path in paths)


def test_no_shared_memory_means_nothing_to_remove(tmp_path):
    assert remove_dead_rings(folder=tmp_path / "not-there") == []
