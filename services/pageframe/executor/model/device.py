"""Which device to run on; never a silent fall back to the CPU."""

import shutil
from pathlib import Path

import torch

from pageframe.core.errors import InvalidRequestError, PreconditionError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(wanted: str, root: Path = Path("/")) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device.

    Args:
        wanted: ``auto`` takes the GPU of a machine that has one, and the CPU of one that has not.
        root: Where ``dev`` is mounted.

    Raises:
        PreconditionError: reason DEVICE_UNAVAILABLE; a GPU is asked for, or is there under
            ``auto``, and PyTorch cannot use it. The message holds the driver's own words.
        InvalidRequestError: reason DEVICE_UNKNOWN.
    """
    if wanted not in DEVICES:
        raise InvalidRequestError(
            "DEVICE_UNKNOWN", f"device {wanted!r} is none of {', '.join(DEVICES)}", device=wanted
        )
    if wanted == "cpu" or (wanted == "auto" and not has_nvidia_device(root)):
        return torch.device("cpu")
    problem = cuda_problem()
    if problem:
        raise PreconditionError(
            "DEVICE_UNAVAILABLE",
            f"the GPU cannot be used: {problem} (--device cpu runs without it)",
            device=wanted,
            torch_version=torch.__version__,
        )
    return torch.device("cuda", 0)


def has_nvidia_device(root: Path = Path("/")) -> bool:
    """Whether this machine shows an NVIDIA GPU, whether or not PyTorch can use it."""
    has_node = any((root / "dev").glob("nvidia[0-9]*"))
    return has_node or (root == Path("/") and shutil.which("nvidia-smi") is not None)


def cuda_problem() -> str:
    """Why PyTorch cannot use CUDA, in its or the driver's words; empty when it can."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return ""
