"""What can be wrong with a machine, found before anything starts; one line each, with a way out.

Facts are gathered in one place and judged by pure functions, so that every bad machine can be
put together in a test.
"""

import errno
import importlib.metadata
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pageframe.config import machine
from pageframe.config.settings import METERED_SERVICES, Settings
from pageframe.config.values import format_size, parse_host_port
from pageframe.core.errors import PageframeError, PreconditionError, ResourceExhaustedError

PYTHON_MIN = (3, 11)
STATE_BYTES_MIN = 256 * 1024**2
# Interpreters, libraries and buffers of all processes together, measured without weights.
BASE_MEMORY_BYTES = 1024**3
# https://docs.nvidia.com/deploy/cuda-compatibility: oldest driver for any minor of a CUDA major.
_DRIVER_MIN_BY_CUDA_MAJOR = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What the checks look at.

    Attributes:
        python_version: Major and minor.
        optimised: Whether Python runs under ``-O``, which removes asserts.
        memory_available_bytes: Within the cgroup's limit.
        state_disk_free_bytes: On the file system of the state folder.
        nvidia_driver: Version of the loaded driver; None without one.
        torch_cuda: CUDA release that PyTorch was built for; None for a CPU build.
    """

    python_version: tuple[int, int]
    optimised: bool
    memory_available_bytes: int
    state_disk_free_bytes: int
    nvidia_driver: str | None
    torch_cuda: str | None


def gather_facts(settings: Settings) -> MachineFacts:
    """Look at this machine. Cheap: nothing is imported or started for it."""
    return MachineFacts(
        python_version=(sys.version_info.major, sys.version_info.minor),
        optimised=not __debug__,
        memory_available_bytes=machine.memory_available_bytes(),
        state_disk_free_bytes=machine.disk_free_bytes(settings.state_dir),
        nvidia_driver=machine.nvidia_driver_version(),
        torch_cuda=_torch_cuda_release(),
    )


def find_problems(facts: MachineFacts, settings: Settings) -> Iterator[PageframeError]:
    """Yield everything that makes serving impossible; each message is one line."""
    if facts.python_version < PYTHON_MIN:
        yield PreconditionError(
            "PYTHON_TOO_OLD",
            f"Python {_dotted(facts.python_version)} is too old: install Python "
            f"{_dotted(PYTHON_MIN)} or later and make the environment again",
        )
    if facts.optimised:
        yield PreconditionError(
            "PYTHON_OPTIMISED",
            "Python runs with -O, which removes the checks that guard memory: "
            "start it without -O and without PYTHONOPTIMIZE",
        )
    if facts.state_disk_free_bytes < STATE_BYTES_MIN:
        yield ResourceExhaustedError(
            "DISK_FULL",
            f"the state folder {settings.state_dir} has {format_size(facts.state_disk_free_bytes)} "
            f"free, {format_size(STATE_BYTES_MIN)} are needed: free some, or give another "
            "--state-dir",
        )
    yield from find_memory_problems(facts.memory_available_bytes, 0, settings)
    yield from _find_gpu_problems(facts, settings)


def find_memory_problems(
    available_bytes: int, weights_bytes: int, settings: Settings
) -> Iterator[PageframeError]:
    """Yield a problem when weights, KV blocks and processes cannot fit together.

    ``weights_bytes`` is 0 while the model is unknown.
    """
    needed_bytes = BASE_MEMORY_BYTES + settings.kv_memory_bytes + weights_bytes
    if settings.device.startswith("cuda"):
        needed_bytes = BASE_MEMORY_BYTES
    if available_bytes < needed_bytes:
        yield ResourceExhaustedError(
            "MEMORY_TOO_SMALL",
            f"{format_size(available_bytes)} of memory are available (within the cgroup's limit), "
            f"{format_size(needed_bytes)} are needed: free some, raise the limit, or take a "
            "smaller --model or --kv-memory",
        )


def find_gpu_notice(facts: MachineFacts, settings: Settings) -> str | None:
    """A line about a GPU that will not be used, so that nobody serves on the CPU unknowingly."""
    if settings.device == "auto" and facts.nvidia_driver and not facts.torch_cuda:
        return (
            "an NVIDIA GPU is here, but PyTorch is its CPU build: serving on the CPU; "
            "to use the GPU install PyTorch for CUDA, to silence this give --device cpu"
        )
    return None


def _find_gpu_problems(facts: MachineFacts, settings: Settings) -> Iterator[PageframeError]:
    if settings.device == "cpu":
        return
    if settings.device != "auto" and facts.nvidia_driver is None:
        yield PreconditionError(
            "GPU_MISSING",
            f"--device {settings.device}, but no NVIDIA driver is loaded: install the driver "
            "(in a container, run it with the GPU runtime), or give --device cpu",
        )
        return
    if settings.device != "auto" and facts.torch_cuda is None:
        yield PreconditionError(
            "TORCH_WITHOUT_CUDA",
            f"--device {settings.device}, but PyTorch is its CPU build: install PyTorch for CUDA, "
            "or give --device cpu",
        )
        return
    if facts.nvidia_driver is None or facts.torch_cuda is None:
        return
    cuda_major = int(facts.torch_cuda.split(".")[0])
    oldest = _DRIVER_MIN_BY_CUDA_MAJOR.get(cuda_major)
    driver = tuple(int(part) for part in facts.nvidia_driver.split("."))
    if oldest is not None and driver < oldest:
        yield PreconditionError(
            "GPU_DRIVER_TOO_OLD",
            f"the NVIDIA driver {facts.nvidia_driver} is too old for CUDA {facts.torch_cuda}: "
            f"update it to {_dotted(oldest)} or later, or give --device cpu",
        )


def check_metrics_ports(settings: Settings) -> None:
    """Try to listen where services will tell their metrics.

    Raises:
        PreconditionError: ``PORT_TAKEN``, with the port.
    """
    if not settings.metrics_port:
        return
    # The first three are those of ``metrics_port_of``; each further replica has two.
    services = METERED_SERVICES + METERED_SERVICES[1:] * (settings.replicas - 1)
    for port, service in enumerate(services, settings.metrics_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.metrics_host, port))
                probe.listen(1)
            except (OSError, OverflowError):
                raise PreconditionError(
                    "PORT_TAKEN",
                    f"port {port} on {settings.metrics_host}, for metrics of the {service}, is "
                    f"taken: give the first of {len(services)} others as --metrics-port, or 0 for "
                    "none",
                    port=port,
                ) from None


def check_port(address: str, option: str) -> None:
    """Try to listen where the gateway will; port 0 is always free.

    Raises:
        PreconditionError: ``PORT_TAKEN`` or ``ADDRESS_UNUSABLE``, with the address.
    """
    wanted = parse_host_port(address)
    try:
        found = socket.getaddrinfo(*wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PreconditionError(
                "PORT_TAKEN",
                f"port {wanted.port} on {wanted.host} is taken: stop what listens there, or give "
                f"--{option} {wanted.host}:0 for a free one",
            ) from None
        raise PreconditionError(
            "ADDRESS_UNUSABLE", f"cannot listen on {address}: {error.strerror}; give another "
            f"--{option} HOST:PORT"
        ) from None  # fmt: skip


def _torch_cuda_release() -> str | None:
    """CUDA release of the installed PyTorch, from its files: importing it takes seconds."""
    try:
        files = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(files)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    match = re.search(r"^cuda(?::[^=]*)?\s*=\s*'([\d.]+)'", text, re.M)
    return match[1] if match else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def check_writable(state_dir: Path) -> None:
    """Make the state folder, private to the user.

    Raises:
        PreconditionError: ``STATE_DIR_UNUSABLE``.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(state_dir, os.W_OK | os.X_OK)
        reason = "" if usable else "no permission to write"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise PreconditionError(
            "STATE_DIR_UNUSABLE",
            f"cannot use the state folder {state_dir}: {reason}; give another --state-dir",
        )
