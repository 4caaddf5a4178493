"""What is refused before a weight is read: settings, models and sizes that cannot work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from pageframe.core.errors import (
    InvalidRequestError,
    PreconditionError,
    ResourceExhaustedError,
    UnimplementedError,
)
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.dtypes import KV_DTYPES, MODEL_DTYPES, checkpoint_dtype, dtype_name
from pageframe.executor.model.host_memory import available_memory_bytes
from pageframe.executor.model.weights import weight_files
from pageframe.kernels.cpu.library import CHOICES
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

RUNNERS: Final = ("auto", "native", "transformers", "sim")
SEQUENCE_TOKENS_MIN: Final = 256
"""Tokens of the shortest sequence worth serving: what the largest block holds."""

_SETTINGS = {
    "runner": RUNNERS,
    "dtype": ("auto", *MODEL_DTYPES),
    "kv_dtype": ("auto", *KV_DTYPES),
    "cpu_kernels": CHOICES,
}
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
# The first chips that convert to and from fp8 (e4m3).
_FP8_CAPABILITY_MIN = (8, 9)
_MIB = 2**20


def check_settings(**settings: str) -> None:
    """Refuse words that a setting does not have.

    Raises:
        InvalidRequestError: SETTING_INVALID.
    """
    for field, value in settings.items():
        if value not in _SETTINGS[field]:
            raise InvalidRequestError(
                "SETTING_INVALID",
                f"{field} {value!r} is none of {', '.join(_SETTINGS[field])}",
                field=field,
            )


def check_causal(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse models that do not continue a text.

    Raises:
        InvalidRequestError: MODEL_NOT_CAUSAL.
    """
    architectures = config.get("architectures") or []
    is_causal = any(str(name).endswith(_CAUSAL_SUFFIXES) for name in architectures)
    if not is_causal or config.get("is_encoder_decoder"):
        named = ", ".join(map(str, architectures)) or "no architecture"
        raise InvalidRequestError(
            "MODEL_NOT_CAUSAL",
            f"{folder} is no causal language model: its config.json names {named}",
            architectures=named,
        )


def check_kv_dtype(device: torch.device, kv_dtype: torch.dtype) -> None:
    """Refuse keys and values in a type that the device cannot convert.

    Raises:
        PreconditionError: DTYPE_UNSUPPORTED.
    """
    if device.type != "cuda" or kv_dtype != torch.float8_e4m3fn:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY_MIN:
        had, needed = (".".join(map(str, pair)) for pair in (capability, _FP8_CAPABILITY_MIN))
        raise PreconditionError(
            "DTYPE_UNSUPPORTED",
            f"kv-dtype fp8 needs compute capability {needed} and {device} has {had}; int8 takes "
            "as little memory",
            device=str(device),
            capability=had,
            capability_needed=needed,
        )


def check_memory(
    folder: Path,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    """Refuse weights that do not fit beside one sequence.

    Files are counted as if all of them were in ``dtype``. What a model of another runner keeps per
    token is not known before it is loaded, and counts for nothing.

    Raises:
        ResourceExhaustedError: MODEL_TOO_LARGE.
    """
    file_bytes = sum(file.stat().st_size for file in weight_files(folder))
    weights_bytes = file_bytes * dtype.itemsize // checkpoint_dtype(config).itemsize
    sequence_bytes = SEQUENCE_TOKENS_MIN * _kv_bytes_per_token(config, kv_dtype)
    needed_bytes = weights_bytes + sequence_bytes
    available_bytes = _available_bytes(device)
    if needed_bytes > available_bytes:
        missing_bytes = needed_bytes - available_bytes
        raise ResourceExhaustedError(
            "MODEL_TOO_LARGE",
            f"the weights take {_mib(weights_bytes)} as {dtype_name(dtype)}, a sequence of "
            f"{SEQUENCE_TOKENS_MIN} tokens {_mib(sequence_bytes)}, and {device} has "
            f"{_mib(available_bytes)} left: {_mib(missing_bytes)} are missing",
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
            missing_bytes=missing_bytes,
        )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_memory_bytes()
    return int(torch.cuda.mem_get_info(device)[0])


def _kv_bytes_per_token(config: Mapping[str, Any], kv_dtype: torch.dtype) -> int:
    try:
        parsed = parse_decoder_config(config)
    except UnimplementedError:
        return 0
    return KvLayout(
        num_layers=parsed.num_layers,
        block_size=1,
        num_kv_heads=parsed.num_kv_heads,
        head_dim=parsed.head_dim,
        dtype=kv_dtype,
        is_quantised=kv_dtype in QUANTISED_DTYPES,
    ).kv_bytes_per_token


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"
