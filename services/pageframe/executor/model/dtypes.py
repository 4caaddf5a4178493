"""Types of weights and of keys and values: their names, and which one ``auto`` means."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from pageframe.executor.model.linear import can_pack

MODEL_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KV_DTYPES: Final = MODEL_DTYPES | {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As settings and facts spell it."""
    return _NAMES[dtype]


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a checkpoint's weights are stored in, by its ``config.json``."""
    for found in (config, text_config(config)):
        named = found.get("dtype") or found.get("torch_dtype")
        if named in MODEL_DTYPES:
            return MODEL_DTYPES[named]
    return torch.float32


def choose_dtype(
    wanted: str, stored: torch.dtype, device: torch.device, *, has_kernels: bool
) -> torch.dtype:
    """What weights are computed with.

    Args:
        wanted: One of ``MODEL_DTYPES``, or ``auto``: the checkpoint's type, unless that is slow.
        stored: The checkpoint's.
        device: Where it computes.
        has_kernels: Whether compiled CPU kernels take the model in ``stored``. They compute in
            float32 whatever the weights are: half the bytes, and at no batch size slower (AVX2).
    """
    if wanted != "auto":
        return MODEL_DTYPES[wanted]
    if device.type != "cpu" or stored == torch.float32 or has_kernels:
        return stored
    # PyTorch, without the instructions, emulates half precision: a bfloat16 prompt took six times
    # as long as a float32 one on a CPU with AVX2 only.
    return stored if can_pack(stored) else torch.float32


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that speaks of the language model, where others (images, sound) stand beside it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config
