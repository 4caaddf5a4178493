"""Which device to run on; never a silent fall back to the CPU."""

import re
import shutil
from pathlib import Path

import torch

from pageframe.core.errors import InvalidRequestError, PreconditionError

_DEVICE = re.compile(r"auto|cpu|cuda(:(?P<index>\d+))?")


def choose_device(wanted: str, root: Path = Path("/")) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX`` into a device.

    Args:
        wanted: ``auto`` takes the GPU of a machine that has one, and the CPU of one that has not.
        root: Where ``dev`` is mounted.

    Raises:
        PreconditionError: reason DEVICE_UNAVAILABLE; a GPU is asked for, or is there under
            ``auto``, and PyTorch cannot use it. The message holds the driver's own words.
        InvalidRequestError: reason DEVICE_UNKNOWN.
    """
    known = _DEVICE.fullmatch(wanted)
    if known is None:
        raise InvalidRequestError(
            "DEVICE_UNKNOWN",
            f"device {wanted!r} is none of auto, cpu, cuda and cuda:INDEX",
            device=wanted,
        )
    if wanted == "cpu" or (wanted == "auto" and not has_nvidia_device(root)):
        return torch.device("cpu")
    index = int(known["index"] or 0)
    problem = cuda_problem(index)
    if problem:
        raise PreconditionError(
            "DEVICE_UNAVAILABLE",
            f"the GPU cannot be used: {problem} (--device cpu runs without it)",
            device=wanted,
            torch_version=torch.__version__,
        )
    return torch.device("cuda", index)


def has_nvidia_device(root: Path = Path("/")) -> bool:
    """Whether this machine shows an NVIDIA GPU, whether or not PyTorch can use it."""
    has_node = any((root / "dev").glob("nvidia[0-9]*"))
    return has_node or (root == Path("/") and shutil.which("nvidia-smi") is not None)


def cuda_problem(index: int = 0) -> str:
    """Why PyTorch cannot use the GPU of this index, in the driver's words; else empty."""
    try:
        torch.cuda.init()
        torch.zeros(1, device=f"cuda:{index}")
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return ""
