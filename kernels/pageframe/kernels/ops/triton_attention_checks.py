"""What Triton attention refuses: devices, rooms and shapes that do not fit."""

from dataclasses import fields

import torch
import triton

from pageframe.kernels.jit.attention_tiles import HEAD_DIM_MAX, ONE_BYTE_HEAD_DIM_MAX
from pageframe.kernels.jit.variants import FP8_CAPABILITY_MIN
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.triton_attention_plan import Room

# Triton multiplies matrices without tensor cores on older chips (triton-lang/triton #5066), and
# these kernels then spill most of what they hold.
_CAPABILITY_MIN = 80


def check_device(device: torch.device, dtype: torch.dtype, layout: KvLayout) -> tuple[int, int]:
    """Check that the kernels run on a device with these types.

    Returns:
        Its compute capability times ten, and its number of multiprocessors; of an interpreter
        0 and 1.

    Raises:
        ValueError: they do not.
    """
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError("Triton runs on a CPU only with TRITON_INTERPRET=1, set before import")
        return 0, 1
    if device.type != "cuda":
        raise ValueError(f"there are no Triton kernels for {device}")
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    needed = FP8_CAPABILITY_MIN if layout.dtype == torch.float8_e4m3fn else _CAPABILITY_MIN
    if capability < needed:
        raise ValueError(
            f"{dtype} over {layout.dtype} needs compute capability {needed}, not {capability}"
        )
    widest = ONE_BYTE_HEAD_DIM_MAX if layout.is_quantised else HEAD_DIM_MAX
    if layout.head_dim > widest or layout.head_dim % 2:
        raise ValueError(
            f"heads have {layout.head_dim} channels; even counts to {widest} fit {layout.dtype}"
        )
    return capability, int(torch.cuda.get_device_properties(device).multi_processor_count)


def fits_device(device: torch.device, dtype: torch.dtype, layout: KvLayout) -> bool:
    """Whether ``check_device`` raises nothing."""
    try:
        check_device(device, dtype, layout)
    except ValueError:
        return False
    return True


def check_room(needed: Room, room: Room) -> None:
    """Check that a step fits into tables.

    Raises:
        ValueError: it does not.
    """
    for field in fields(Room):
        count, most = getattr(needed, field.name), getattr(room, field.name)
        if count > most:
            raise ValueError(f"{field.name} of this step is {count}, with room for {most}")


def check_run(
    query: torch.Tensor,
    layer: torch.Tensor,
    layout: KvLayout,
    num_heads: int,
    scale: float,
    slopes: torch.Tensor | None,
) -> None:
    """Check that a layer's tensors belong together.

    Raises:
        ValueError: they do not.
    """
    expected = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
    if layer.dim() != 5 or tuple(layer.shape[1:]) != expected or layer.dtype != layout.dtype:
        raise ValueError(
            f"layer has shape {tuple(layer.shape)} of {layer.dtype} for blocks of "
            f"{layout.block_size}; see layouts.py"
        )
    if layer.stride(4) != 1:
        raise ValueError(f"channels of a head lie {layer.stride(4)} elements apart, not 1")
    if query.dim() != 3 or query.shape[2] != layout.head_dim:
        raise ValueError(f"query {tuple(query.shape)} does not fit layer {tuple(layer.shape)}")
    if query.shape[1] != num_heads or num_heads % layout.num_kv_heads:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {layout.num_kv_heads} key heads evenly, "
            f"{num_heads} of them planned"
        )
    if not scale > 0.0:
        raise ValueError(f"scores are multiplied by {scale}; it must be positive")
    if slopes is not None and slopes.shape != (num_heads,):
        raise ValueError(f"slopes {tuple(slopes.shape)}; one per query head is needed")
