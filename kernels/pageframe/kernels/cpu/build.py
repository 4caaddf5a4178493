"""The libraries of CPU kernels: brought along by a wheel, else compiled once and kept.

    wheel   kernels/cpu/lib/pageframe_cpu-avx2-<sources>.so       every instruction set
    cache   ~/.cache/pageframe/kernels/pageframe_cpu-avx2-<key>.so   what this machine has asked for

The name in the cache says all that the content depends on: sources, flags, compiler. So nothing is
ever out of date; a library appears under its name only when it is whole, and two processes that
want the same one wait for each other. ``python -m pageframe.kernels.cpu.build`` does it in advance.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from pageframe.core.errors import PageframeError, PreconditionError
from pageframe.kernels.cpu import isa as isas
from pageframe.kernels.cpu.compiler import (
    FLAGS,
    Compiler,
    accepts,
    compile_library,
    find_compiler,
)
from pageframe.kernels.cpu.isa import InstructionSet

SOURCE_DIR = Path(__file__).parent / "csrc"
PACKAGED_DIR = Path(__file__).parent / "lib"
_PATIENCE_SECONDS = 2.0
_NUM_DIGEST_DIGITS = 16

Say = Callable[[str], None]
"""Takes a line for a person."""


def cache_dir() -> Path:
    """Where compiled libraries are kept: a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pageframe" / "kernels"


def sources(folder: Path = SOURCE_DIR) -> list[Path]:
    """The files that are compiled, in a fixed order."""
    return sorted(folder.glob("*.cpp"))


def source_digest(folder: Path = SOURCE_DIR) -> str:
    """Changes whenever a source or header changes."""
    content = [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.[ch]*"))]
    return _digest(part for name, text in content for part in (name.encode(), text))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:_NUM_DIGEST_DIGITS]


def _key(isa: InstructionSet, compiler: Compiler) -> str:
    words = (source_digest(), compiler.version, *FLAGS, *isa.compiler_flags)
    return _digest(word.encode() for word in words)


def packaged_library(isa: InstructionSet, folder: Path = PACKAGED_DIR) -> Path:
    """Where a wheel has a library of these very sources, if it has one."""
    return folder / f"pageframe_cpu-{isa.name}-{source_digest()}.so"


def find_or_build(isa: InstructionSet, say: Say, folder: Path | None = None) -> Path:
    """The library for an instruction set, compiled now if need be.

    Safe to call from several processes at once.

    Args:
        isa: What to compile for; this machine need not have it.
        say: Hears one line when compiling, or waiting, takes over two seconds.
        folder: Where libraries are kept; the user's cache unless given.

    Raises:
        PreconditionError: ``NO_COMPILER``, ``COMPILER_FAILED`` or ``KERNEL_CACHE_UNUSABLE``.
    """
    packaged = packaged_library(isa)
    if packaged.is_file():
        return packaged
    compiler = _compiler()
    folder = folder or cache_dir()
    target = folder / f"pageframe_cpu-{isa.name}-{_key(isa, compiler)}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _told_when_slow(f"compiling CPU kernels ({isa.name}), once; this takes a while", say),
            _locked(folder / f".{target.stem}.lock"),
        ):
            if not target.is_file():
                _build(isa, compiler, target)
    except OSError as error:
        raise PreconditionError(
            "KERNEL_CACHE_UNUSABLE", f"cannot keep compiled kernels in {folder}: {error.strerror}"
        ) from None
    return target


@cache
def _compiler() -> Compiler:
    return find_compiler()


def _build(isa: InstructionSet, compiler: Compiler, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        compile_library(compiler, sources(), isa.compiler_flags, made)
        made.rename(target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _told_when_slow(line: str, say: Say) -> Iterator[None]:
    timer = threading.Timer(_PATIENCE_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def best_isa() -> InstructionSet:
    """The best instruction set that this machine has and for which a library can be had.

    Raises:
        PreconditionError: ``NO_COMPILER`` where no wheel brought a library, ``COMPILER_FAILED`` for
            one that knows no processor like this, or ``CPU_TOO_OLD``.
    """
    usable = [isa for isa in isas.usable(isas.cpu_flags()) if not isa.is_for_tests]
    if not usable:
        names = ", ".join(isas.NAMES)
        raise PreconditionError("CPU_TOO_OLD", f"this processor has none of {names}")
    for isa in usable:
        if packaged_library(isa).is_file() or accepts(_compiler(), isa.compiler_flags):
            return isa
    raise PreconditionError(
        "COMPILER_FAILED", f"{_compiler().version} cannot compile for {usable[-1].name}"
    )


def _write_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, which is 0 too when kernels cannot be compiled here."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels for this machine.")
    parser.add_argument("--isa", choices=[isa.name for isa in isas.known()], help="only this one")
    chosen = parser.parse_args(arguments).isa
    try:
        named = [isa for isa in isas.known() if isa.name == chosen]
        find_or_build(named[0] if named else best_isa(), _write_line)
    except PageframeError as error:
        _write_line(f"CPU kernels are not compiled: {error.message}; PyTorch computes instead")
        return 0 if chosen is None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
