"""The installer: what it looks at first, which PyTorch it takes, and when it does nothing."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pageframe.config import install

REPOSITORY = install.REPOSITORY
GIB = 1024**3


def problems(**changed: object) -> list[str]:
    facts: dict[str, object] = {
        "has_ensurepip": True,
        "disk_free_bytes": 100 * GIB,
        "memory_bytes": 8 * GIB,
        "has_gpu": False,
    }
    return install.find_problems(**(facts | changed))  # type: ignore[arg-type]


def test_a_good_machine_has_no_problems() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changed", "named", "way_out"),
    [
        ({"has_ensurepip": False}, "-venv is missing", "apt-get install python3"),
        ({"disk_free_bytes": GIB}, "1.0 GiB of disk", "free some"),
        ({"disk_free_bytes": 5 * GIB, "has_gpu": True}, "12 GiB are needed", "free some"),
        ({"memory_bytes": GIB}, "1.0 GiB of memory", "raise the limit"),
    ],
)
def test_a_fault_is_one_line_with_the_way_out(
    changed: dict[str, object], named: str, way_out: str
) -> None:
    (line,) = problems(**changed)
    assert named in line
    assert way_out in line
    assert "\n" not in line


def test_an_old_python_exits_with_2_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "find_newer_python", lambda: None)
    with pytest.raises(SystemExit) as caught:
        install.require_python((3, 9), ["install.py"])
    assert caught.value.code == 2
    assert "Python 3.9 is too old: install Python 3.11" in capsys.readouterr().err


def test_an_old_python_hands_over_to_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(install, "find_newer_python", lambda: "/opt/python3.12")
    monkeypatch.setattr(os, "execv", lambda path, arguments: calls.append((path, arguments)))
    monkeypatch.setattr(sys, "exit", lambda _: None)
    install.require_python((3, 8), ["install.py", "--extra", "all"])
    assert calls == [("/opt/python3.12", ["/opt/python3.12", "install.py", "--extra", "all"])]
    install.require_python((3, 11), ["install.py"])
    assert len(calls) == 1, "a Python that is new enough goes on"


def test_a_shim_that_does_not_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, working = tmp_path / "python3.12", tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    working.symlink_to(sys.executable)
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.find_newer_python() == str(working)


def test_an_old_python_can_read_the_installer() -> None:
    """Otherwise it would say SyntaxError, and not what to do."""
    source = Path(install.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))


def torch_arguments(
    *, gpu: bool = False, listed: str = "", reachable: bool = False, num_bytes: int | None = None
) -> list[str]:
    return install.torch_arguments(
        "2.13.0",
        has_gpu=gpu,
        listed_versions=lambda: listed,
        is_reachable=lambda _: reachable,
        cuda_download_bytes=lambda: num_bytes,
    )


def test_a_cpu_build_that_pip_already_finds_is_taken() -> None:
    assert torch_arguments(listed="2.14.0, 2.13.0+cpu, 2.13.0", reachable=True) == []


def test_else_pytorchs_own_cpu_index_is_used_when_it_answers() -> None:
    arguments = torch_arguments(listed="2.13.0", reachable=True)
    assert arguments == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


@pytest.mark.parametrize(("num_bytes", "size"), [(2_871_000_000, "2.9 GB"), (None, "about 3 GB")])
def test_else_the_size_of_the_cuda_build_is_said_first(
    num_bytes: int | None, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torch_arguments(listed="2.13.0", num_bytes=num_bytes) == []
    assert size in capsys.readouterr().err


def test_a_gpu_machine_gets_the_cuda_build_without_asking() -> None:
    assert torch_arguments(gpu=True, listed="2.13.0+cpu", reachable=True) == []


def test_the_stamp_vouches_for_one_digest_and_its_extras(tmp_path: Path) -> None:
    stamp = tmp_path / "stamp.json"
    assert not install.is_installed(stamp, "all", "d1")
    stamp.write_text(json.dumps({"digest": "d1", "extras": ["all"]}))
    assert install.is_installed(stamp, "all", "d1")
    assert not install.is_installed(stamp, "dev", "d1")
    assert not install.is_installed(stamp, "all", "d2")
    stamp.write_text("half a fi")
    assert not install.is_installed(stamp, "all", "d1")


def test_the_digest_follows_both_files(tmp_path: Path) -> None:
    def digest(project: str, constraints: str) -> str:
        (tmp_path / "pyproject.toml").write_text(project)
        (tmp_path / "constraints.txt").write_text(constraints)
        return install.source_digest(tmp_path)

    assert len({digest("a", "b"), digest("a", "c"), digest("d", "b")}) == 3
    assert digest("a", "b") == digest("a", "b")


def test_everything_that_is_asked_for_is_pinned() -> None:
    """Without pins pip searches for minutes."""
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    normal = re.compile(r"[-_.]+")
    pinned = {normal.sub("-", line.split("==")[0]).lower() for line in constraints.splitlines()}
    assert all("==" in line for line in constraints.splitlines())
    assert install.pinned_torch(constraints) == "2.13.0"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in ("gateway", "scheduler", "executor", "all", "dev", "bench"):
        wanted += project["optional-dependencies"][extra]
    names = {normal.sub("-", re.split(r"[\[<>=~ ]", item)[0]).lower() for item in wanted}
    assert names - pinned == {"pageframe"}


def test_make_alone_prints_help_with_every_target() -> None:
    done = subprocess.run(
        ["make", "-C", str(REPOSITORY)], capture_output=True, text=True, check=True
    )
    for target in ("setup", "up", "test", "verify", "fix", "protos", "protos-check", "clean"):
        assert re.search(rf"^  make {target} +\S", done.stdout, re.M), target


def test_ci_runs_make_verify_and_the_images() -> None:
    script = REPOSITORY / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make verify", "exec make test-compose"]
    assert os.access(script, os.X_OK)


def test_what_a_start_imports_is_compiled_whatever_the_shell_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "started_first.py").write_text("import started_second\n")
    (tmp_path / "started_second.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    install.compile_started(Path(sys.executable), ["started_first"])
    compiled = {file.name.partition(".")[0] for file in tmp_path.rglob("*.pyc")}
    assert compiled == {"started_first", "started_second"}
    with pytest.raises(install.InstallError, match="No module named 'started_third'"):
        install.compile_started(Path(sys.executable), ["started_first", "started_third"])


def test_all_that_a_start_imports_is_there() -> None:
    for module in install._STARTED:
        assert importlib.util.find_spec(module) is not None, module
