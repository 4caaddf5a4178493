"""Makes the virtual environment and installs Pageframe into it: ``python3 install.py --extra all``.

Runs before anything is installed, with whatever Python is there, so it uses the standard library
alone and its first lines must be readable to an old Python. Looks first: Python, venv, disk,
memory; each fault is one line with the way out and exit code 2. Does nothing when a stamp says
that this very ``pyproject.toml`` and ``constraints.txt`` are installed already.
"""

import os
import shutil
import subprocess
import sys

PYTHON_MIN = (3, 11)
EXIT_BAD_ENVIRONMENT = 2


def find_newer_python() -> "str | None":
    """A Python on the PATH that is new enough and really runs (shims often do not)."""
    for name in ("python3.12", "python3.13", "python3.11", "python3.14"):
        path = shutil.which(name)
        probe = "import sys; sys.exit(sys.version_info < (3, 11))"
        if path and subprocess.call([path, "-c", probe], stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def require_python(version: "tuple[int, ...]", arguments: "list[str]") -> None:
    """Go on under a newer Python when this one is too old; exit with 2 when there is none."""
    if version >= PYTHON_MIN:
        return
    newer = find_newer_python()
    if newer:
        os.execv(newer, [newer, *arguments])  # noqa: S606
    found = ".".join(str(part) for part in version[:2])
    say(f"Python {found} is too old: install Python 3.11 or later (it may stand beside this one)")
    sys.exit(EXIT_BAD_ENVIRONMENT)


def say(line: str) -> None:
    """Write a line for a person; standard output is for results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    require_python(sys.version_info[:2], sys.argv)
    # The folder of this file is no place to import from; its source root is.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse  # noqa: E402
import hashlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
import urllib.error  # noqa: E402
import urllib.request  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from pathlib import Path  # noqa: E402

from pageframe.config import machine  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[3]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GIB = 1024**3
DISK_BYTES_MIN = 4 * GIB
# PyTorch with its CUDA libraries, unpacked.
DISK_BYTES_MIN_CUDA = 12 * GIB
MEMORY_BYTES_MIN = 2 * GIB
_PROBE_TIMEOUT_SECONDS = 3.0
_STAMP_NAME = "pageframe-installed.json"
# What an extra brings along.
_COVERS = {"all": {"all"}, "dev": {"all", "dev"}, "bench": {"all", "dev", "bench"}}
# Where commands and services begin. Whoever imports a module first compiles it, and for all of
# these that takes ten times as long as importing them: not what the first start should wait for.
_STARTED = (
    "pageframe.cli.main",
    "pageframe.cli.commands",
    "pageframe.cli.up",
    "pageframe.gateway.server",
    "pageframe.scheduler.server",
    "pageframe.executor.server",
    "pageframe.executor.model.loader",
    "pageframe.telemetry.__main__",
    # Imported late, for a collector.
    "pageframe.telemetry.client",
    # Imported late, for a terminal.
    "rich.progress",
)
_FETCHED = re.compile(r"^\s*(?:Downloading|Using cached) (\S+\.whl)(.*)$")
_UNPACKED = re.compile(r"^Installing collected packages: (.*)$")


class InstallError(Exception):
    """Something that a person can mend; the message is one line with the way out."""


def find_problems(
    *, has_ensurepip: bool, disk_free_bytes: int, memory_bytes: int, has_gpu: bool
) -> list[str]:
    """What stands in the way of installing, one line each."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    disk_min = DISK_BYTES_MIN_CUDA if has_gpu else DISK_BYTES_MIN
    problems = []
    if not has_ensurepip:
        problems.append(
            f"python{version}-venv is missing: install it, on Debian and Ubuntu with "
            f"`sudo apt-get install python{version}-venv`"
        )
    if disk_free_bytes < disk_min:
        problems.append(
            f"{disk_free_bytes / GIB:.1f} GiB of disk are free here, {disk_min / GIB:.0f} GiB are "
            "needed: free some, or move this folder to a larger disk"
        )
    if memory_bytes < MEMORY_BYTES_MIN:
        problems.append(
            f"{memory_bytes / GIB:.1f} GiB of memory are available (within the cgroup's limit), "
            f"{MEMORY_BYTES_MIN / GIB:.0f} GiB are needed: free some or raise the limit"
        )
    return problems


def source_digest(repository: Path) -> str:
    """Changes whenever what would be installed changes."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((repository / name).read_bytes())
    return digest.hexdigest()


def is_installed(stamp: Path, extra: str, digest: str) -> bool:
    """Whether the stamp vouches for this extra at this digest."""
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found.get("digest") == digest and extra in found.get("extras", []))


def pinned_torch(constraints: str) -> str:
    """The version of PyTorch that the constraints pin, for example ``"2.13.0"``."""
    match = re.search(r"^torch==(\S+)$", constraints, re.M)
    assert match, "constraints.txt pins torch"
    return match[1]


def torch_arguments(
    version: str,
    *,
    has_gpu: bool,
    listed_versions: Callable[[], str],
    is_reachable: Callable[[str], bool],
    cuda_download_bytes: Callable[[], int | None],
) -> list[str]:
    """Arguments for pip that bring the right build of PyTorch.

    A machine without a GPU gets the CPU build, a tenth of the size: from the indexes that pip is
    configured with if one of them has it, else from PyTorch's own; failing both it gets the CUDA
    build, which computes on the CPU just as well, and is told the size first.
    """
    if has_gpu or f"{version}+cpu" in listed_versions():
        return []
    if is_reachable(TORCH_CPU_INDEX):
        return ["--extra-index-url", TORCH_CPU_INDEX]
    num_bytes = cuda_download_bytes()
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes else "about 3 GB"
    say(
        f"PyTorch's CPU build cannot be had ({TORCH_CPU_INDEX} is out of reach): downloading the "
        f"CUDA build and its libraries instead, {size}; Ctrl-C to stop"
    )
    return []


class Pip:
    """pip of one virtual environment."""

    def __init__(self, python: Path, repository: Path) -> None:
        self._command = [str(python), "-m", "pip"]
        self._repository = repository

    def output(self, *arguments: str) -> str:
        """Standard output of a pip command; empty when it fails."""
        done = subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def install(self, *arguments: str) -> None:
        """Install, showing what happens.

        Raises:
            InstallError: with pip's last words.
        """
        command = [*self._command, "install", "--disable-pip-version-check", "--no-input"]
        # Compiling every module takes longer than everything else, and most are never imported.
        command += [
            "--no-compile",
            "--progress-bar",
            "off",
            "-c",
            str(self._repository / "constraints.txt"),
        ]
        words = ["pip said nothing"]
        with subprocess.Popen(
            [*command, *arguments],
            cwd=self._repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                _show_progress(line)
                if "ERROR" in line:
                    words.append(line.strip())
        if process.returncode != 0:
            raise InstallError(f"cannot install: {words[-1]}")

    def cuda_download_bytes(self, version: str) -> int | None:
        """What PyTorch's CUDA build and its libraries weigh; None if nobody tells."""
        # Older pips download everything to answer this.
        self.output("install", "--quiet", "--upgrade", "pip>=23.3")
        report = self.output(
            "install", "--quiet", "--dry-run", "--report", "-", f"torch=={version}"
        )
        if not report:
            return None
        items = json.loads(report)["install"]
        return total_bytes(item["download_info"]["url"] for item in items)


def _show_progress(line: str) -> None:
    """The lines of pip that a person wants to see, shortened."""
    # No assignment expressions in this file: an old Python must be able to read it.
    fetched, unpacked = _FETCHED.match(line), _UNPACKED.match(line)
    if fetched:
        say("  " + fetched[1].split("/")[-1] + fetched[2])
    if unpacked:
        say(f"  unpacking {unpacked[1].count(',') + 1} packages")


def total_bytes(urls: Iterable[str]) -> int | None:
    """Sum of the sizes that servers give for some files; None if one does not."""
    num_bytes = 0
    for url in urls:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_SECONDS) as answer:  # noqa: S310
                num_bytes += int(answer.headers["Content-Length"])
        except (OSError, ValueError, TypeError):
            return None
    return num_bytes


def is_reachable(url: str) -> bool:
    """Whether a server answers soon, whatever it says."""
    try:
        with urllib.request.urlopen(url + "/torch/", timeout=_PROBE_TIMEOUT_SECONDS):  # noqa: S310
            return True
    except (OSError, ValueError):
        return False


def make_environment(folder: Path) -> Path:
    """Make the virtual environment unless there is a working one; returns its Python.

    Raises:
        InstallError: if it cannot be made.
    """
    python = folder / "bin" / "python"
    works = python.exists() and subprocess.call([python, "-c", "import pip"]) == 0
    if not works:
        say(f"making the virtual environment {folder}")
        command = [sys.executable, "-m", "venv", "--clear", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
            raise InstallError(f"cannot make {folder}: {lines[-1]}")
    return python


def compile_started(python: Path, modules: Iterable[str] = _STARTED) -> None:
    """Import what a start imports, so that it is compiled by then.

    Raises:
        InstallError: with the last words of a module that cannot be imported.
    """
    say("  compiling what a start imports")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [str(python), "-c", "import " + ", ".join(modules)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["Python said nothing"]
        raise InstallError(f"what was installed cannot be imported: {words[-1]}")


def install(repository: Path, folder: Path, extra: str) -> None:
    """Bring the environment up to date for one extra.

    Raises:
        InstallError: one line with the way out.
    """
    stamp = folder / _STAMP_NAME
    digest = source_digest(repository)
    if is_installed(stamp, extra, digest):
        return
    has_gpu = machine.nvidia_driver_version() is not None
    problems = find_problems(
        has_ensurepip=importlib.util.find_spec("ensurepip") is not None,
        disk_free_bytes=machine.disk_free_bytes(repository),
        memory_bytes=machine.memory_available_bytes(),
        has_gpu=has_gpu,
    )
    if problems:
        raise InstallError(problems[0])
    start = time.monotonic()
    pip = Pip(make_environment(folder), repository)
    version = pinned_torch((repository / "constraints.txt").read_text(encoding="utf-8"))
    arguments = torch_arguments(
        version,
        has_gpu=has_gpu,
        listed_versions=lambda: pip.output("index", "versions", "torch"),
        is_reachable=is_reachable,
        cuda_download_bytes=lambda: pip.cuda_download_bytes(version),
    )
    extras = f"{extra},gpu" if has_gpu else extra
    say(f"installing pageframe[{extras}]; the first time this takes a few minutes")
    pip.install(*arguments, "-e", f".[{extras}]")
    compile_started(folder / "bin" / "python")
    content = {"digest": digest, "extras": sorted(_COVERS[extra])}
    stamp.write_text(json.dumps(content) + "\n", encoding="utf-8")
    say(f"installed in {time.monotonic() - start:.0f} s")


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Install Pageframe into a virtual environment.")
    parser.add_argument("--extra", choices=sorted(_COVERS), default="all")
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv")
    chosen = parser.parse_args(arguments)
    try:
        install(REPOSITORY, chosen.venv, chosen.extra)
    except InstallError as error:
        say(f"pageframe: {error}")
        return EXIT_BAD_ENVIRONMENT
    except KeyboardInterrupt:
        say("pageframe: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
