"""Bad machines, put together from facts: each is one line with the way out."""

import dataclasses
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageframe.cli.checks import (
    BASE_MEMORY_BYTES,
    MachineFacts,
    check_port,
    check_writable,
    find_gpu_notice,
    find_memory_problems,
    find_problems,
)
from pageframe.cli.run_folder import (
    SOCKET_PATH_BYTES_MAX,
    make_run_folder,
    remove_dead_run_folders,
)
from pageframe.config.settings import Settings
from pageframe.core.errors import PreconditionError

GIB = 1024**3
GOOD = MachineFacts(
    python_version=(3, 11),
    optimised=False,
    memory_available_bytes=8 * GIB,
    state_disk_free_bytes=8 * GIB,
    nvidia_driver=None,
    torch_cuda=None,
)


def problem(settings: Settings | None = None, **changed: object) -> tuple[str, str]:
    """The only problem of a good machine with some facts changed."""
    facts = dataclasses.replace(GOOD, **changed)  # type: ignore[arg-type]
    (found,) = find_problems(facts, settings or Settings())
    assert "\n" not in found.message
    return found.reason, found.message


def test_a_good_machine_has_no_problems() -> None:
    assert not list(find_problems(GOOD, Settings()))


def test_an_old_python_is_named_with_the_one_needed() -> None:
    reason, message = problem(python_version=(3, 9))
    assert reason == "PYTHON_TOO_OLD"
    assert "3.9" in message
    assert "install Python 3.11" in message


def test_python_without_assertions_is_refused() -> None:
    reason, message = problem(optimised=True)
    assert reason == "PYTHON_OPTIMISED"
    assert "PYTHONOPTIMIZE" in message


def test_a_full_disk_is_named_with_the_numbers() -> None:
    reason, message = problem(state_disk_free_bytes=10 * 1024**2)
    assert reason == "DISK_FULL"
    assert "10 MiB" in message
    assert "--state-dir" in message


def test_too_little_memory_is_named_with_the_numbers() -> None:
    reason, message = problem(memory_available_bytes=GIB // 2)
    assert reason == "MEMORY_TOO_SMALL"
    assert "512 MiB" in message
    assert "--kv-memory" in message


def test_kv_memory_and_weights_count_as_needed() -> None:
    settings = Settings(kv_memory_bytes=2 * GIB)
    enough = BASE_MEMORY_BYTES + 3 * GIB
    assert not list(find_memory_problems(enough, GIB, settings))
    assert list(find_memory_problems(enough - 1, GIB, settings))


@pytest.mark.parametrize(
    ("driver", "cuda"), [("470.57.02", "12.8"), ("525.60.12", "12.4"), ("570.10", "13.0")]
)
def test_a_driver_too_old_for_this_cuda_is_said_and_never_silently_the_cpu(
    driver: str, cuda: str
) -> None:
    reason, message = problem(nvidia_driver=driver, torch_cuda=cuda)
    assert reason == "GPU_DRIVER_TOO_OLD"
    assert driver in message
    assert "update it to" in message
    assert "--device cpu" in message


@pytest.mark.parametrize(
    ("driver", "cuda"), [("525.60.13", "12.8"), ("580.65.06", "13.0"), ("999.1", "14.0")]
)
def test_a_driver_that_is_new_enough_is_no_problem(driver: str, cuda: str) -> None:
    facts = dataclasses.replace(GOOD, nvidia_driver=driver, torch_cuda=cuda)
    assert not list(find_problems(facts, Settings()))


def test_an_old_driver_does_not_matter_on_the_cpu() -> None:
    facts = dataclasses.replace(GOOD, nvidia_driver="390.1", torch_cuda="12.8")
    assert not list(find_problems(facts, Settings(device="cpu")))


def test_cuda_without_a_driver_or_a_cuda_build_is_refused() -> None:
    cuda = Settings(device="cuda:0")
    assert problem(cuda, torch_cuda="12.8")[0] == "GPU_MISSING"
    assert problem(cuda, nvidia_driver="580.65.06")[0] == "TORCH_WITHOUT_CUDA"


def test_a_gpu_that_goes_unused_is_noticed() -> None:
    unused = dataclasses.replace(GOOD, nvidia_driver="580.65.06")
    notice = find_gpu_notice(unused, Settings())
    assert notice is not None
    assert "CPU build" in notice
    assert find_gpu_notice(GOOD, Settings()) is None
    assert find_gpu_notice(unused, Settings(device="cpu")) is None


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def test_a_taken_port_is_named_with_the_way_out(taken_port: int) -> None:
    with pytest.raises(
        PreconditionError, match=f"port {taken_port} on 127.0.0.1 is taken"
    ) as caught:
        check_port(f"127.0.0.1:{taken_port}", "grpc")
    assert caught.value.reason == "PORT_TAKEN"
    assert "--grpc 127.0.0.1:0" in caught.value.message


def test_port_zero_is_never_taken() -> None:
    check_port("127.0.0.1:0", "grpc")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"cannot listen on 192\.0\.2\.1:50051"):
        check_port("192.0.2.1:50051", "grpc")


def test_a_state_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(PreconditionError, match="give another --state-dir"):
        check_writable(file / "below")


def test_a_new_state_folder_is_private(tmp_path: Path) -> None:
    check_writable(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_sockets_live_in_the_state_folder_when_its_path_is_short(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "s", {})
    assert folder.parent == tmp_path / "s" / "run"
    assert folder.stat().st_mode & 0o077 == 0


def test_sockets_of_a_long_state_path_go_to_a_short_private_folder(tmp_path: Path) -> None:
    state_dir = tmp_path / ("x" * SOCKET_PATH_BYTES_MAX)
    # Not in `tmp_path`, which may be long itself.
    with tempfile.TemporaryDirectory(prefix="r") as runtime_dir:
        folder = make_run_folder(state_dir, {"XDG_RUNTIME_DIR": runtime_dir})
        assert folder.parent == Path(runtime_dir)
        assert folder.stat().st_mode & 0o077 == 0
        assert len(str(folder / "scheduler.sock")) <= SOCKET_PATH_BYTES_MAX


def test_when_no_path_is_short_enough_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("y" * SOCKET_PATH_BYTES_MAX)
    long.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(long))
    with pytest.raises(PreconditionError, match="give a shorter --state-dir") as caught:
        make_run_folder(long, {"XDG_RUNTIME_DIR": str(long)})
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"


def test_folders_of_dead_runs_are_removed_and_others_kept(tmp_path: Path) -> None:
    # Process ids end at 2**22.
    for name in (str(2**22 + 1), "1", "notes"):
        (tmp_path / name).mkdir()
    remove_dead_run_folders(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "notes"]
