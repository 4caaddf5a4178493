"""What all services do before they serve: import, and hear of their settings."""

import gc
import os
import subprocess
import sys

import pytest

from pageframe.config.imports import collecting_no_garbage
from pageframe.config.launch import Launch
from pageframe.config.settings import load_settings


@pytest.fixture(autouse=True)
def _as_it_was():
    assert gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_in_the_block_and_what_came_in_it_is_never_looked_at_again():
    gc.unfreeze()
    with collecting_no_garbage():
        assert not gc.isenabled()
        made = [[number] for number in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    assert not any(made is tracked for tracked in gc.get_objects())


def test_an_error_in_the_block_leaves_collecting_on():
    with pytest.raises(ZeroDivisionError), collecting_no_garbage():
        raise ZeroDivisionError
    assert gc.isenabled()


SERVICE = """
from pageframe.config.service_main import run_from_launch_file

async def serve(launch):
    print(launch.model_path)

run_from_launch_file("pageframe-test", lambda: serve)
"""


def run_told(told: bytes) -> "subprocess.CompletedProcess[bytes]":
    """A service that says which model it was told of, told on standard input."""
    command = [sys.executable, "-c", SERVICE, "--settings", "-"]
    return subprocess.run(command, input=told, capture_output=True, timeout=60, check=False)


def test_a_service_can_be_told_its_launch_file_on_standard_input(tmp_path):
    path = tmp_path / "laun\u00e7h.json"
    Launch(
        settings=load_settings({"state-dir": str(tmp_path)}, {}),
        model_path=tmp_path / "model",
        run_dir=tmp_path,
        num_threads=1,
        supervisor_pid=1,
    ).write(path)
    done = run_told(os.fsencode(path))
    assert (done.returncode, done.stdout.decode().strip()) == (0, str(tmp_path / "model")), done


def test_a_service_that_is_told_nothing_ends_without_a_word():
    done = run_told(b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_service_does_not_import_what_draws_for_people():
    look = "lambda: sys.exit('rich.console' in sys.modules)"
    script = "import sys" + SERVICE.replace("lambda: serve", look)
    command = [sys.executable, "-c", script, "--settings", "-"]
    assert subprocess.run(command, input=b"", timeout=60, check=False).returncode == 0
