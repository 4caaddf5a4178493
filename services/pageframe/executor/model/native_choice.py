"""Which decoder takes a native model: compiled CPU kernels where they can, else PyTorch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pageframe.core.errors import PreconditionError, UnimplementedError
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.decoder_config import (
    DecoderConfig,
    Family,
    JsonObject,
    parse_decoder_config,
)
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.fused import why_not as why_not_fused
from pageframe.executor.model.native import NativeDecoder
from pageframe.executor.model.weights import Progress
from pageframe.kernels.cpu import library

TRITON = "triton"
"""What computes on a GPU that the kernels take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest:
    """A native model and what it is wanted in.

    Attributes:
        folder: Hugging Face folder.
        config: What its ``config.json`` says.
        dtype: Of weights.
        kv_dtype: Of keys and values.
        device: Where it computes.
        cpu_kernels: One of ``kernels.cpu.library.CHOICES``.
        is_deterministic: Whether no token may depend on what else is in its batch.
        progress: Told how far reading is.
    """

    folder: Path
    config: DecoderConfig
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    cpu_kernels: str
    is_deterministic: bool
    progress: Progress


def has_kernels(
    config: JsonObject,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    cpu_kernels: str,
) -> bool:
    """Whether compiled kernels would compute a model in these types.

    Raises:
        InvalidRequestError: MODEL_CONFIG_INVALID.
        PageframeError: kernels were asked for by name and are not to be had.
    """
    if device.type != "cpu":
        return False
    try:
        parsed = parse_decoder_config(config)
    except UnimplementedError:
        return False
    return not _why_not(parsed, dtype, kv_dtype) and library.choose(cpu_kernels).library is not None


def load_native(request: NativeRequest) -> tuple[Decoder, str]:
    """The decoder, and what computes: ``fused (avx2)``, ``triton``, or ``torch (why)``.

    Empty on a GPU without Triton, or with one that its kernels do not take.

    Raises:
        PreconditionError: CPU_KERNELS_UNAVAILABLE; kernels were named that cannot take the model,
            or that are not to be had. DETERMINISM_UNAVAILABLE; it was asked for.
        NotFoundError: the folder has no safetensors files.
        InvalidRequestError: they do not hold what the config says.
    """
    config, dtype = request.config, request.dtype
    chosen, reason = _choose(request)
    if chosen is None and request.is_deterministic:
        raise not_deterministic(reason or f"products on {request.device} are PyTorch's")
    if chosen is None and request.device.type == "cuda" and find_spec("triton") is not None:
        # Late, because Triton is there only where there is a GPU.
        from pageframe.executor.model.device_decoder import DeviceDecoder, fits_kernels

        capability = torch.cuda.get_device_capability(request.device)
        if fits_kernels(config, dtype, request.kv_dtype, capability):
            decoder = DeviceDecoder(request.folder, config, dtype, request.device, request.progress)
            return decoder, TRITON
    if chosen is None:
        native = NativeDecoder(request.folder, config, dtype, request.device, request.progress)
        return native, f"torch ({reason})" if reason else ""
    fused = FusedDecoder(
        request.folder, config, dtype, chosen, torch.get_num_threads(), request.progress
    )
    return fused, f"fused ({chosen.isa})"


def not_deterministic(why: str) -> PreconditionError:
    """The refusal to compute what was asked to be deterministic."""
    return PreconditionError(
        "DETERMINISM_UNAVAILABLE",
        "deterministic needs the compiled CPU kernels, which compute each row by itself, and they "
        f"would not compute this: {why}",
    )


def _choose(request: NativeRequest) -> tuple[library.CpuLibrary | None, str]:
    """The kernels, or None and why not."""
    if request.device.type != "cpu":
        return None, ""
    wanted = request.cpu_kernels
    reason = _why_not(request.config, request.dtype, request.kv_dtype)
    if reason and wanted not in (library.AUTO, library.TORCH):
        raise PreconditionError(
            "CPU_KERNELS_UNAVAILABLE",
            f"the {wanted} kernels cannot compute this model: {reason}; let cpu-kernels be auto",
            cpu_kernels=wanted,
        )
    if reason:
        return None, reason
    choice = library.choose(wanted)
    return choice.library, choice.reason


def _why_not(config: DecoderConfig, dtype: torch.dtype, kv_dtype: torch.dtype) -> str:
    """Why compiled CPU kernels cannot take a model; empty if they can."""
    if config.family is not Family.LLAMA:
        return f"no kernels for {config.family.value} models"
    return why_not_fused(config, dtype, kv_dtype)
