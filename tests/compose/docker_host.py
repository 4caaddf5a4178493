"""Docker on this machine, with nothing but Debian and root: installed, started, given a base image.

No image registry is asked for anything. What is downloaded is kept in the user's cache, and so are
the layers of images, so that a second run builds only what has changed.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
}
SUITE = "bookworm"
IMAGE_PACKAGES = "python3,python3-venv,ca-certificates"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
ROOT_IMAGE = f"pageframe-test/{SUITE}"
BASE_IMAGE = "pageframe-test/base"
DAEMON_START_S = 60.0
DAEMON_STOP_S = 60.0
_INSTALL_S = 600.0
_BOOTSTRAP_S = 900.0
# The variables by which programs are told of a bundle of certificates.
_CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# What of pip's configuration says where packages are.
_PIP_PLACES = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy")


class DockerUnavailableError(Exception):
    """Docker cannot run here; the message says why."""


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pageframe" / "compose"


def run(
    *command: str,
    timeout_s: float,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **(environ or {})},
        cwd=cwd,
    )
    said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{said}"
    return done.stdout


def eventually(
    condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float
) -> None:
    """Wait until a condition holds; it is asked again and again."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout_s:g} s: {told}")
        time.sleep(0.1)


def install_docker() -> None:
    """Have Docker, docker-compose and debootstrap on the PATH.

    Raises:
        DockerUnavailableError: they are not here and this is no Debian, or we are not root.
    """
    missing = sorted({package for name, package in PACKAGES.items() if not shutil.which(name)})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise DockerUnavailableError(f"{', '.join(missing)} must be installed, by root on Debian")
    quietly = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        run("apt-get", "update", timeout_s=_INSTALL_S, environ=quietly)
        command = ("apt-get", "install", "-y", "--no-install-recommends", *missing)
        run(*command, timeout_s=_INSTALL_S, environ=quietly)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise DockerUnavailableError(f"cannot install {', '.join(missing)}: {error}") from None


def is_daemon_up() -> bool:
    done = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30)
    return done.returncode == 0


@contextlib.contextmanager
def daemon() -> Iterator[None]:
    """Have a Docker daemon: the one that runs, else one of our own, which ends with the block.

    Raises:
        DockerUnavailableError: it does not start.
    """
    if is_daemon_up():
        yield
        return
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "dockerd.log"
    command = ["dockerd", "--data-root", str(folder / "docker")]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_up(process, log_path)
        yield
    finally:
        process.terminate()
        try:
            process.wait(DAEMON_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_up(process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline_s = time.monotonic() + DAEMON_START_S
    while not is_daemon_up():
        if process.poll() is not None or time.monotonic() > deadline_s:
            last = "; ".join(log_path.read_text().splitlines()[-3:])
            raise DockerUnavailableError(f"dockerd does not start: {last}")
        time.sleep(0.2)


@dataclass(frozen=True, slots=True)
class PipPlaces:
    """Where pip finds packages on this machine.

    Attributes:
        lines: Of a ``pip.conf`` that says the same inside an image.
        folders: Local folders that it names, by their place inside the image.
    """

    lines: tuple[str, ...]
    folders: tuple[tuple[Path, str], ...]


def pip_places(listing: str) -> PipPlaces:
    """What ``pip config list`` says, made true inside an image.

    Local folders of wheels go along; local indexes do not: they may be anything in size, and what
    they have is on the public one.
    """
    values: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in _PIP_PLACES:
            values[option] = value.strip().strip("'")
    lines, folders = ["[global]", f"cert = {CA_BUNDLE}"], []
    for option, value in sorted(values.items()):
        kept = []
        for place in value.replace("\\n", " ").split():
            local = Path(place.removeprefix("file://"))
            if not place.startswith(("/", "file:")):
                kept.append(place)
            elif option == "find-links" and local.is_dir():
                inside = f"/opt/pip/{len(folders)}"
                folders.append((local, inside))
                kept.append(inside)
        if kept:
            lines.append(f"{option} = {' '.join(kept)}")
    return PipPlaces(tuple(lines), tuple(folders))


def has_cpu_torch(places: PipPlaces, version: str) -> bool:
    """Whether one of the local folders has PyTorch's CPU build."""
    return any(list(folder.glob(f"torch-{version}+cpu-*.whl")) for folder, _ in places.folders)


def make_base_image() -> None:
    """Have ``BASE_IMAGE``: Debian with Python, this machine's certificates and pip's places."""
    _import_root()
    listing = run(sys.executable, "-m", "pip", "config", "list", timeout_s=60)
    places = pip_places(listing)
    folder = cache_dir() / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(CA_BUNDLE, folder / "ca-certificates.crt")
    (folder / "pip.conf").write_text("\n".join(places.lines) + "\n")
    steps = [f"FROM {ROOT_IMAGE}", f"COPY ca-certificates.crt {CA_BUNDLE}"]
    steps.append("COPY pip.conf /etc/pip.conf")
    for number, (source, inside) in enumerate(places.folders):
        shutil.copytree(source, folder / str(number), copy_function=_link_or_copy)
        steps.append(f"COPY {number} {inside}")
    steps.append("ENV " + " ".join(f"{name}={CA_BUNDLE}" for name in _CA_VARIABLES))
    (folder / "Dockerfile").write_text("\n".join(steps) + "\n")
    build = ("docker", "build", "--quiet", "--tag", BASE_IMAGE, str(folder))
    run(*build, timeout_s=_INSTALL_S, environ={"DOCKER_BUILDKIT": "0"})
    shutil.rmtree(folder)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _import_root() -> None:
    """Have ``ROOT_IMAGE``; its tarball is made once and kept."""
    tarball = cache_dir() / f"{SUITE}-{_digest(IMAGE_PACKAGES)}.tar"
    tag = f"{ROOT_IMAGE}:latest"
    if run("docker", "images", "--quiet", tag, timeout_s=60).strip():
        return
    if not tarball.exists():
        _bootstrap(tarball)
    run("docker", "import", str(tarball), tag, timeout_s=_INSTALL_S)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _bootstrap(tarball: Path) -> None:
    """Make a small Debian; what apt keeps for a next time stays out."""
    root, partial = tarball.with_suffix(".root"), tarball.with_suffix(".partial")
    _remove_root(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    run(
        *("debootstrap", "--variant=minbase", f"--include={IMAGE_PACKAGES}"),
        *(SUITE, str(root), "http://deb.debian.org/debian"),
        timeout_s=_BOOTSTRAP_S,
    )
    _unmount(root)
    with tarfile.open(partial, "w") as archive:
        archive.add(root, arcname=".", filter=_without_caches)
    partial.rename(tarball)
    _remove_root(root)


def _unmount(root: Path) -> None:
    for mounted in ("proc", "sys"):
        subprocess.run(["umount", str(root / mounted)], capture_output=True, check=False)


def _remove_root(root: Path) -> None:
    """Remove a root folder, but never what is still mounted into it."""
    if root.exists():
        _unmount(root)
        assert not any(os.path.ismount(root / name) for name in ("proc", "sys"))
        shutil.rmtree(root)


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    left_out: Sequence[str] = ("./var/cache/apt/", "./var/lib/apt/lists/", "./proc/", "./sys/")
    return None if member.name.startswith(tuple(left_out)) else member
