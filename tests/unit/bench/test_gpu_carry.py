"""What a machine without a network is brought: which wheels, and how they are imported there."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import carry
from bench.gpu.carry import CarryError, Package

_REPOSITORY = Path(__file__).resolve().parents[3]


def _wheel(folder, name, module="carried_thing", version="1.0"):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"VERSION = {version!r}\n")
    return path


def test_versions_are_those_of_our_constraints(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("other-thing==2\nThing==3.4\n")
    assert carry.pinned(Package("thing", "thing"), constraints) == "Thing==3.4"
    assert carry.pinned(Package("thing", "thing", "9"), constraints) == "thing==9"
    with pytest.raises(CarryError, match="which version of lost to take"):
        carry.pinned(Package("lost", "lost"), constraints)


def test_all_that_is_needed_has_a_version():
    assert [carry.pinned(package).partition("==")[0] for package in carry.NEEDED] == [
        "structlog",
        "llguidance",
    ]


def _pip(monkeypatch, folder, sizes, returncode=0, stderr=""):
    calls = []

    def run(command, **_):
        calls.append(command)
        for name, num_bytes in sizes.items():
            (folder / name).write_bytes(bytes(num_bytes))
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(carry.subprocess, "run", run)
    return calls


def test_wheels_are_asked_for_the_python_that_is_there(monkeypatch, tmp_path, capsys):
    (tmp_path / "old.whl").write_bytes(b"")
    calls = _pip(monkeypatch, tmp_path, {"b.whl": 1 << 20, "a.whl": 3 << 19})
    assert carry.fetch([Package("thing", "thing", "9")], tmp_path) == 5 << 19
    (command,) = calls
    assert command[-1] == "thing==9"
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert command[command.index("--python-version") + 1] == "3.12"
    assert {"manylinux_2_39_x86_64", "manylinux_2_31_x86_64", "manylinux2014_x86_64"} < set(command)
    assert capsys.readouterr().out == "  1.50 MiB  a.whl\n  1.00 MiB  b.whl\n"
    assert not (tmp_path / "old.whl").exists()


def test_too_much_is_refused_with_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(carry, "NUM_BYTES_MAX", 2 << 20)
    _pip(monkeypatch, tmp_path, {"a.whl": (2 << 20) + 1})
    with pytest.raises(CarryError, match=r"take 2\.0 MiB and 2 MiB can be carried"):
        carry.fetch([], tmp_path)


def test_what_pip_says_last_is_told(monkeypatch, tmp_path):
    _pip(monkeypatch, tmp_path, {}, returncode=1, stderr="much\nERROR: no such thing\n")
    with pytest.raises(CarryError, match="cannot download all wheels: ERROR: no such thing"):
        carry.fetch([], tmp_path)


def test_only_what_cannot_be_imported_is_taken(monkeypatch, tmp_path):
    needed = (Package("numpy", "numpy"), Package("carried-thing", "carried_thing"))
    monkeypatch.setattr(carry, "NEEDED", needed)
    _wheel(tmp_path, "numpy")
    wheel = _wheel(tmp_path, "carried_thing")
    assert carry.wheels_of_lacking(tmp_path) == [wheel]
    wheel.unlink()
    with pytest.raises(CarryError, match=r"carried_thing cannot be imported and .* has no wheel"):
        carry.wheels_of_lacking(tmp_path)


def test_a_peer_that_was_not_brought_is_not_missed(monkeypatch, tmp_path):
    monkeypatch.setattr(carry, "NEEDED", ())
    monkeypatch.setattr(carry, "PEERS", {"peer": (Package("lost-peer", "lost_peer"),)})
    assert carry.wheels_of_lacking(tmp_path) == []
    wheel = _wheel(tmp_path, "lost_peer")
    assert carry.wheels_of_lacking(tmp_path) == [wheel]


def test_carried_modules_are_imported_behind_our_own_and_once_unpacked_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(carry.tempfile, "gettempdir", lambda: str(tmp_path))
    wheel = _wheel(tmp_path, "carried_thing", version="7")
    surroundings = carry.environment([wheel])
    code = "import carried_thing, pageframe.core.units, bench; print(carried_thing.VERSION)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("7\n", "")
    (made,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert carry.unpack([wheel]) == made


def _vllm_wheel(folder):
    path = folder / "vllm-0.22.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "import much_else\n")
        archive.writestr("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "library")
        archive.writestr("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "not wanted")
        ops = "vllm/v1/attention/ops"
        archive.writestr(f"{ops}/triton_attention_helpers.py", "")
        archive.writestr(
            f"{ops}/triton_unified_attention.py",
            "import vllm.envs as envs\nfrom vllm.logger import init_logger\n"
            "from vllm.platforms import current_platform\nfrom vllm.triton_utils import tl\n"
            "from vllm.v1.kv_cache_interface import KVQuantMode\n"
            "print(envs.VLLM_BATCH_INVARIANT, init_logger('a').name, KVQuantMode.NONE.value,\n"
            "      current_platform.fp8_dtype(), tl.int32)\n",
        )
        archive.writestr("vllm/vllm_flash_attn/flash_attn_interface.py", "")
    return path


def test_kernels_are_taken_out_of_the_large_wheel_and_can_be_imported(monkeypatch, tmp_path):
    def run(command, **_):
        if command[-1] == "vllm==0.22.0":
            _vllm_wheel(Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(carry.subprocess, "run", run)
    carry.fetch(carry.PEERS["vllm"], tmp_path)
    monkeypatch.undo()
    (wheel,) = tmp_path.glob("**/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so" in names
    assert "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so" not in names
    code = "import sys; sys.path.insert(0, sys.argv[1]); "
    code += "import vllm.v1.attention.ops.triton_unified_attention"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("False a 0 torch.float8_e4m3fn int32\n", "")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["test-gpu", "bench-gpu", "SETUP=", "PEER=vllm", "PYTHON=snake"],
            [
                "snake -m bench.gpu.carry run -m pytest -m gpu tests/unit/kernels/triton "
                "tests/unit/model/test_device_streams.py",
                "snake -m bench.gpu.carry run -m bench.gpu --peer vllm",
            ],
        ),
        (["bench-gpu", "ARGS=--dry-run"], ["python -m bench.gpu --dry-run"]),
    ],
)
def test_the_targets_install_nothing_where_they_are_told_so(words, lines):
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [" ".join(line.split()) for line in done.stdout.splitlines()]
    if "SETUP=" in words:
        assert found == lines
    else:
        assert found[-1:] == lines
        assert any("install.py" in line for line in found)
