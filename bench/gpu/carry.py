"""What a machine with a GPU and no network lacks: gathered as wheels here, used there uninstalled.

    here     python -m bench.gpu.carry fetch          wheels into build/carry
    there    make test-gpu bench-gpu SETUP=           runs ``python3 -m bench.gpu.carry run -m ...``

``run`` puts our source roots and the wheels of whatever cannot be imported behind what is there: a
package that is installed is never covered. The standard library alone; both commands need Python
3.11 or later. Wheels are not part of the repository.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import carry_vllm

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "build" / "carry"
NUM_BYTES_MAX = 55 << 20
"""Of all wheels: what such machines are sent at once is 64 MiB, sources included."""

_SOURCE_ROOTS = ("services", "protos", "kernels", "shared", ".")
_PYTHON_THERE = "3.12"
# Of glibc, up to what there is: pip matches each exactly.
_GLIBC_MINORS = range(39, 4, -1)
EXIT_LACKING = 2


class CarryError(Exception):
    """Something that a person can mend; one line with the way out."""


@dataclass(frozen=True)
class Package:
    """A distribution that may have to be carried.

    Attributes:
        name: Of the distribution.
        module: What is imported.
        version: Empty for that of constraints.txt.
    """

    name: str
    module: str
    version: str = ""


NEEDED = (Package("structlog", "structlog"), Package("llguidance", "llguidance"))
"""What our services import and images for PyTorch rarely have."""

PEERS = {
    "flashinfer": (
        Package("flashinfer-python", "flashinfer", "0.6.13"),
        Package("apache-tvm-ffi", "tvm_ffi", "0.1.15.post2"),
    ),
    "vllm": (Package("vllm-kernels", "vllm", carry_vllm.VERSION),),
}
"""Other makers' attention kernels, on request. FlashInfer's are compiled there, on their first use;
vLLM's are FlashAttention 3 and a Triton kernel."""


def pinned(package: Package, constraints: Path = REPOSITORY / "constraints.txt") -> str:
    """``name==version``.

    Raises:
        CarryError: constraints.txt does not name it.
    """
    if package.version:
        return f"{package.name}=={package.version}"
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line.partition("==")[0].lower() == package.name.lower():
            return line
    raise CarryError(f"{constraints.name} does not say which version of {package.name} to take")


def fetch(packages: Sequence[Package], folder: Path = FOLDER) -> int:
    """Have pip download wheels for the machine that runs them; their bytes in all.

    Raises:
        CarryError: pip cannot, or they are too large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    repacked = set(PEERS["vllm"])
    _download([pinned(each) for each in packages if each not in repacked], folder)
    if repacked.intersection(packages):
        with tempfile.TemporaryDirectory(dir=folder) as whole:
            _download([f"vllm=={carry_vllm.VERSION}"], Path(whole))
            carry_vllm.repack(next(Path(whole).glob("*.whl")), folder)
    num_bytes = 0
    for wheel in sorted(folder.glob("*.whl")):
        num_bytes += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    if num_bytes > NUM_BYTES_MAX:
        raise CarryError(
            f"the wheels take {num_bytes / 2**20:.1f} MiB and {NUM_BYTES_MAX / 2**20:.0f} MiB can "
            "be carried: leave a peer out"
        )
    return num_bytes


def _download(wanted: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", _PYTHON_THERE]
    for minor in _GLIBC_MINORS:
        command += ["--platform", f"manylinux_2_{minor}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise CarryError(f"pip cannot download all wheels: {why}")


def wheels_of_lacking(folder: Path = FOLDER) -> list[Path]:
    """Wheels of packages that this Python cannot import.

    Raises:
        CarryError: one is needed and was not carried.
    """
    wheels = []
    for package in (*NEEDED, *(package for group in PEERS.values() for package in group)):
        if importlib.util.find_spec(package.module) is not None:
            continue
        carried = sorted(folder.glob(f"{package.name.replace('-', '_')}-*.whl"))
        if carried:
            wheels.append(carried[-1])
        elif package in NEEDED:
            raise CarryError(
                f"{package.module} cannot be imported and {folder} has no wheel of it: run "
                "`python -m bench.gpu.carry fetch` where packages can be had, and bring that "
                "folder along"
            )
    return wheels


def unpack(wheels: Sequence[Path]) -> Path:
    """A folder to import them from; made once for the same wheels.

    Imported as they are packed, those with compiled parts could not be loaded.
    """
    names = hashlib.sha256("\n".join(wheel.name for wheel in wheels).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"pageframe-carried-{os.getuid()}-{names}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            whole = Path(made) / "whole"
            whole.mkdir()
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(whole)
            whole.rename(folder)
    return folder


def environment(wheels: Sequence[Path]) -> dict[str, str]:
    """The process's own, with our sources and what was carried to be imported from."""
    paths = [str((REPOSITORY / root).resolve()) for root in _SOURCE_ROOTS]
    if wheels:
        paths.append(str(unpack(wheels)))
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


def main(words: Sequence[str]) -> int:
    """Command line; 2 where something is lacking."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.carry")
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download wheels into build/carry")
    fetching.add_argument("--with", dest="peers", action="append", choices=PEERS, default=[])
    commands.add_parser("run", help="run Python with what was carried; words as after `python`")
    # What follows ``run`` is Python's, options and all.
    own = words[:1] if words[:1] == ["run"] else words
    arguments = parser.parse_args(own)
    try:
        if arguments.command == "run":
            surroundings = environment(wheels_of_lacking())
            os.execve(sys.executable, [sys.executable, *words[1:]], surroundings)
        fetch([*NEEDED, *(package for peer in arguments.peers for package in PEERS[peer])])
    except CarryError as error:
        print(error, file=sys.stderr)
        return EXIT_LACKING
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
