"""Types of settings: what a value may be, and how its text is read."""

import enum
import os
from pathlib import Path
from typing import Annotated, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from pageframe.config.values import (
    format_policy_names,
    format_tenant_quotas,
    format_tenant_weights,
    parse_duration_seconds,
    parse_host_port,
    parse_policy_names,
    parse_size_bytes,
    parse_tenant_quotas,
    parse_tenant_weights,
)
from pageframe.core.limits import LIMITS
from pageframe.core.replica import TenantQuota
from pageframe.core.units import is_power_of_two

# Pydantic would read the metadata of every installed package in search of plugins.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


@enum.unique
class CpuKernelsName(enum.StrEnum):
    """What computes the native runner's steps on a CPU."""

    AUTO = "auto"
    TORCH = "torch"
    BASELINE = "baseline"
    AVX2 = "avx2"
    AVX512 = "avx512"
    AVX512BF16 = "avx512bf16"


@enum.unique
class RunnerName(enum.StrEnum):
    """Who computes a step."""

    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"
    SIM = "sim"


@enum.unique
class DtypeName(enum.StrEnum):
    """Type of weights and activations."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


@enum.unique
class KvDtypeName(enum.StrEnum):
    """Type of keys and values in the block pool; ``auto`` is that of the activations."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8 = "fp8"
    INT8 = "int8"


@enum.unique
class SpeculationName(enum.StrEnum):
    """Who guesses tokens that a step then checks."""

    OFF = "off"
    NGRAM = "ngram"


@enum.unique
class LogLevel(enum.StrEnum):
    """Least severe log line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_LONG_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _dtype(value: object) -> object:
    return _LONG_DTYPES.get(value, value) if isinstance(value, str) else value


def _kv_memory(value: object) -> object:
    if value == "auto":
        return 0
    return parse_size_bytes(value) if isinstance(value, str) else value


def _duration(value: object) -> object:
    return parse_duration_seconds(value) if isinstance(value, str) else value


def _tenant_quotas(value: object) -> object:
    return parse_tenant_quotas(value) if isinstance(value, str) else value


def _tenant_weights(value: object) -> object:
    return parse_tenant_weights(value) if isinstance(value, str) else value


def _policy_names(value: object) -> object:
    return parse_policy_names(value) if isinstance(value, str) else value


def _grpc(value: object) -> object:
    return str(parse_host_port(value)) if isinstance(value, str) else value


def _http(value: object) -> object:
    if value is None or value == "off":
        return None
    return _grpc(value)


def _path(value: object) -> object:
    if value == "":
        raise ValueError("must be a folder")
    return Path(os.path.expanduser(value)).absolute() if isinstance(value, str) else value


def _api_keys(value: object) -> object:
    if value == "":
        raise ValueError('must be a file or "off"')
    return None if value == "off" else _path(value)


def _number(value: object) -> object:
    # Python counts True as 1; nobody who writes `block-size = true` means 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _block_size(value: object) -> object:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    fits = isinstance(number, int) and not isinstance(number, bool)
    if fits and is_power_of_two(cast(int, number)) and cast(int, number) <= LIMITS.block_size_max:
        return number
    raise ValueError(f"must be a power of two from 1 to {LIMITS.block_size_max}")


Count = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Size = Annotated[int, BeforeValidator(_number), BeforeValidator(_kv_memory)]
Seconds = Annotated[float, BeforeValidator(_number), BeforeValidator(_duration)]
Dtype = Annotated[DtypeName, BeforeValidator(_dtype)]
KvDtype = Annotated[KvDtypeName, BeforeValidator(_dtype)]
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"
BlockSize = Annotated[int, BeforeValidator(_block_size)]
TenantQuotas = Annotated[
    tuple[TenantQuota, ...],
    BeforeValidator(_tenant_quotas),
    PlainSerializer(format_tenant_quotas, when_used="json"),
]
TenantWeights = Annotated[
    tuple[tuple[str, float], ...],
    BeforeValidator(_tenant_weights),
    PlainSerializer(format_tenant_weights, when_used="json"),
]
PolicyNames = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_policy_names),
    PlainSerializer(format_policy_names, when_used="json"),
]
GrpcAddress = Annotated[str, BeforeValidator(_grpc)]
HttpAddress = Annotated[
    str | None,
    BeforeValidator(_http),
    PlainSerializer(lambda address: address or "off", when_used="json"),
]
Folder = Annotated[Path, BeforeValidator(_path)]
ApiKeysFile = Annotated[Path | None, BeforeValidator(_api_keys)]
OptionalFile = ApiKeysFile


def option_name(field_name: str) -> str:
    """The option of a field: ``kv-memory`` of ``kv_memory_bytes``."""
    unitless = field_name.removesuffix("_bytes").removesuffix("_seconds")
    return unitless.replace("_", "-")


class SettingsGroup(BaseModel):
    """Settings that belong together. Fields carry units; option names do not."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=option_name,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
        # Only ``Settings``, which has the fields of all groups, ever checks a value.
        defer_build=True,
    )
