"""Which library is taken, how it is made, and what is said where there is none."""

import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pageframe.config.option_types import CpuKernelsName
from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.kernels.cpu import build, compiler, isa, library
from pageframe.kernels.cpu.compiler import Compiler
from unit.kernels.cpu.libraries import loaded

BASELINE, *_ = (known for known in isa.known() if known.name == "baseline")
_CHOOSE = """
import sys
sys.modules["ziglang"] = None
from pageframe.kernels.cpu.library import choose
choice = choose("auto")
print(choice.library, choice.reason)
"""


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_compiler(folder: Path) -> Compiler:
    """Writes the name of what it compiles; counts links in a file."""
    body = f"""for last; do :; done
case "$*" in *-shared*) echo made >> {folder}/links;; esac
echo library > "$last" """
    return Compiler((str(script(folder / "cc", body)),), "fake 1.0")


def test_flags_of_all_processors_count(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("flags\t\t: fpu avx2 fma\nbugs\t: x\n\nflags\t\t: fpu avx2\n")
    assert isa.cpu_flags(path) == {"fpu", "avx2"}
    assert isa.cpu_flags(tmp_path / "none") == frozenset()


def test_the_best_set_comes_first_and_each_needs_the_simpler_ones():
    everything = frozenset().union(*(known.cpu_flags for known in isa.X86_64))
    names = [known.name for known in isa.usable(everything, "x86_64")]
    assert names == ["avx512bf16", "avx512", "avx512-emulated", "avx2", "baseline"]
    assert [k.name for k in isa.usable(everything - {"avx512_bf16"}, "x86_64")] == names[1:]
    assert [k.name for k in isa.usable(everything - {"fma"}, "x86_64")] == ["baseline"]
    assert isa.usable(frozenset(), "x86_64") == ()
    assert [known.name for known in isa.usable(frozenset(), "aarch64")] == ["baseline"]


def test_the_setting_offers_all_choices():
    assert set(library.CHOICES) == {name.value for name in CpuKernelsName}


def test_the_first_compiler_that_runs_is_taken(tmp_path):
    script(tmp_path / "c++", "exit 1")  # a stub
    script(tmp_path / "g++", "echo g++ 9.9; echo more")
    script(tmp_path / "mine", "echo mine 1 $1")
    path = str(tmp_path)
    found = compiler.find_compiler({"PATH": path}, look_for_ziglang=lambda: False)
    assert found == Compiler((f"{path}/g++",), "g++ 9.9")
    found = compiler.find_compiler({"PATH": path, "CXX": "mine -x"}, look_for_ziglang=lambda: False)
    assert found == Compiler((f"{path}/mine", "-x"), "mine 1 -x")


def test_ziglang_is_the_last_resort(tmp_path):
    script(tmp_path / "python", 'echo "$@"')
    environ = {"PATH": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "python"))
        found = compiler.find_compiler(environ, look_for_ziglang=lambda: True)
    assert found.command[1:] == ("-m", "ziglang", "c++")
    with pytest.raises(PreconditionError, match="NO_COMPILER"):
        compiler.find_compiler(environ, look_for_ziglang=lambda: False)


def test_without_a_compiler_torch_is_chosen_and_the_reason_told(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CHOOSE],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.stdout.startswith("None there is no C++ compiler")


def test_torch_may_be_asked_for_and_an_unknown_set_may_not():
    assert library.choose("torch").library is None
    with pytest.raises(InvalidRequestError, match="ISA_UNSUPPORTED"):
        library.load("avx10")


def test_the_baseline_loads_and_says_what_it_is():
    baseline = loaded("baseline")
    assert (baseline.isa, baseline.num_lanes) == ("baseline", 4)
    assert library.choose("baseline").library is baseline


def test_a_library_is_made_once_by_however_many_and_kept(tmp_path, monkeypatch):
    fake = fake_compiler(tmp_path)
    monkeypatch.setattr(build, "_compiler", lambda: fake)
    kept = tmp_path / "kept"
    paths = []
    makers = [
        threading.Thread(target=lambda: paths.append(build.find_or_build(BASELINE, print, kept)))
        for _ in range(4)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert paths[0].read_text() == "library\n"
    assert (tmp_path / "links").read_text() == "made\n"
    assert [path for path in kept.iterdir() if path.suffix != ".lock"] == [paths[0]]


def test_another_compiler_or_flag_makes_another_library(tmp_path, monkeypatch):
    first = fake_compiler(tmp_path)
    monkeypatch.setattr(build, "_compiler", lambda: first)
    path = build.find_or_build(BASELINE, print, tmp_path)
    newer = Compiler(first.command, "fake 1.1")
    monkeypatch.setattr(build, "_compiler", lambda: newer)
    assert build.find_or_build(BASELINE, print, tmp_path) != path
    monkeypatch.setattr(build, "_compiler", lambda: first)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert build.find_or_build(BASELINE, print, tmp_path) != path


def test_sources_and_headers_are_part_of_the_digest(tmp_path):
    (tmp_path / "a.cpp").write_text("one")
    (tmp_path / "b.h").write_text("two")
    before = build.source_digest(tmp_path)
    (tmp_path / "b.h").write_text("three")
    assert build.source_digest(tmp_path) != before


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    failing = script(tmp_path / "cc", "echo 'a.cpp:1: error: no such luck' >&2; exit 1")
    monkeypatch.setattr(build, "_compiler", lambda: Compiler((str(failing),), "bad"))
    with pytest.raises(PreconditionError, match="no such luck"):
        build.find_or_build(BASELINE, print, tmp_path / "kept")
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_compiler", lambda: fake_compiler(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(PreconditionError, match="KERNEL_CACHE_UNUSABLE"):
        build.find_or_build(BASELINE, print, tmp_path / "file" / "kept")


def test_a_library_in_the_wheel_needs_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "packaged_library", lambda isa: tmp_path / f"{isa.name}.so")
    (tmp_path / "baseline.so").write_text("library")
    assert build.find_or_build(BASELINE, print, tmp_path / "kept") == tmp_path / "baseline.so"
