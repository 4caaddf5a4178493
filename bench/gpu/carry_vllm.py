"""vLLM's attention kernels without vLLM: four files of its wheel, and stand-ins for what they need.

The wheel is a quarter of a gigabyte and needs as much again; a measurement of kernels needs the
library of FlashAttention 3 and one Triton kernel. The stand-ins say what vLLM would say on a chip
of NVIDIA's without any of its settings.
"""

import zipfile
from pathlib import Path

VERSION = "0.22.0"
"""The release for PyTorch 2.11: its library finds there all that it is linked against."""

WHEEL_NAME = f"vllm_kernels-{VERSION}-py3-none-any.whl"

_TAKEN = (
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/vllm_flash_attn/flash_attn_interface.py",
    "vllm/v1/attention/ops/triton_attention_helpers.py",
    "vllm/v1/attention/ops/triton_unified_attention.py",
)

_STAND_INS = {
    "vllm/__init__.py": '"""Only attention kernels."""\n',
    "vllm/envs.py": "VLLM_BATCH_INVARIANT = False\n",
    "vllm/logger.py": "from logging import getLogger as init_logger\n",
    "vllm/triton_utils.py": "import triton\nimport triton.language as tl\n",
    "vllm/platforms.py": """\
import torch


class _Platform:
    def fp8_dtype(self):
        return torch.float8_e4m3fn

    def has_device_capability(self, capability):
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability

    def is_device_capability_family(self, capability):
        return torch.cuda.get_device_capability()[0] == capability // 10


current_platform = _Platform()
""",
    "vllm/v1/kv_cache_interface.py": """\
import enum


class KVQuantMode(enum.IntEnum):
    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    NVFP4 = 4
""",
    "vllm/v1/__init__.py": "",
    "vllm/v1/attention/__init__.py": "",
    "vllm/v1/attention/ops/__init__.py": "",
    "vllm/vllm_flash_attn/__init__.py": "",
}


def repack(wheel: Path, folder: Path) -> Path:
    """A small wheel from the large one.

    Args:
        wheel: vLLM's.
        folder: Where to put it.

    Raises:
        KeyError: a file is not in there; it is of another release.
    """
    target = folder / WHEEL_NAME
    with (
        zipfile.ZipFile(wheel) as whole,
        # 14 MiB, where the usual way makes 37 of the library's 146.
        zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as part,
    ):
        for name in _TAKEN:
            part.writestr(name, whole.read(name))
        for name, content in _STAND_INS.items():
            part.writestr(name, content)
    return target
