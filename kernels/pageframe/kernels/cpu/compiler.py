"""A C++ compiler, if there is one, and how it is called.

Plain ``$CXX``, ``c++``, ``g++``, ``clang++``, or the one in the PyPI package ``ziglang``, in this
order. Headers of Python are not needed: the libraries have a C interface and ctypes loads them.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pageframe.core.errors import PreconditionError

# No -ffast-math and no contraction: the order and the rounding of sums are part of the kernels'
# contract. Vectors wider than the machine's are meant, hence no warning about how they are passed.
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-unknown-pragmas", "-Wno-unknown-warning-option"),
)
_NAMES = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 600
_PROBE_TIMEOUT_SECONDS = 20
_NUM_ERROR_LINES = 3


@dataclass(frozen=True, slots=True)
class Compiler:
    """A command that runs, and the first line of what it says about itself."""

    command: tuple[str, ...]
    version: str


def _commands(environ: Mapping[str, str], has_ziglang: bool) -> Iterator[tuple[str, ...]]:
    if chosen := environ.get("CXX"):
        yield tuple(shlex.split(chosen))
    for name in _NAMES:
        yield (name,)
    if has_ziglang:
        yield (sys.executable, "-m", "ziglang", "c++")


def has_ziglang() -> bool:
    """Whether the PyPI package ``ziglang`` is installed."""
    return importlib.util.find_spec("ziglang") is not None


def find_compiler(
    environ: Mapping[str, str] | None = None, *, look_for_ziglang: Callable[[], bool] = has_ziglang
) -> Compiler:
    """The first compiler that runs.

    Raises:
        PreconditionError: ``NO_COMPILER``.
    """
    environ = os.environ if environ is None else environ
    for command in _commands(environ, look_for_ziglang()):
        path = shutil.which(command[0], path=environ.get("PATH", os.defpath))
        if path is None:
            continue
        probe = (path, *command[1:], "--version")
        try:
            done = subprocess.run(
                probe, capture_output=True, text=True, check=False, timeout=_PROBE_TIMEOUT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        # Stubs that only tell how to install a compiler fail here.
        if done.returncode == 0 and done.stdout:
            return Compiler((path, *command[1:]), done.stdout.splitlines()[0].strip())
    raise PreconditionError(
        "NO_COMPILER",
        "there is no C++ compiler (looked for $CXX, c++, g++, clang++ and the package ziglang)",
    )


def accepts(compiler: Compiler, flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags: an old one may lack those of a new processor."""
    command = [*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def compile_library(
    compiler: Compiler, sources: Sequence[Path], flags: Sequence[str], target: Path
) -> None:
    """Compile sources side by side and link them into ``target``.

    Raises:
        PreconditionError: ``COMPILER_FAILED`` with its first errors.
    """
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as folder_name:
        folder = Path(folder_name)
        objects = [folder / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler.command, *FLAGS, *flags, "-c", str(source), "-o", str(to)]
            for source, to in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
            list(threads.map(_run, commands))
        names = [str(path) for path in objects]
        _run([*compiler.command, "-shared", "-pthread", *flags, *names, "-o", str(target)])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreconditionError("COMPILER_FAILED", f"{command[0]} did not end: {error}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [
            "no reason given"
        ]
        raise PreconditionError(
            "COMPILER_FAILED", f"{command[0]}: {'; '.join(lines[:_NUM_ERROR_LINES])}"
        )
