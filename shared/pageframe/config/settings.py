"""What a person may choose, and the four places where they may choose it.

    command line  >  PAGEFRAME_… variables  >  one TOML file  >  default

All four are laid over one another as ``{option name: (value, where it came from)}`` first and
checked once afterwards, so every message can name the origin and no place has rules of its own.
An option ``block-size`` is ``--block-size``, ``PAGEFRAME_BLOCK_SIZE`` and ``block-size = 16``.
"""

import difflib
import enum
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from pageframe.config.values import (
    RecoveryName,
    format_tenant_quotas,
    parse_duration_seconds,
    parse_host_port,
    parse_size_bytes,
    parse_tenant_quotas,
)
from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS
from pageframe.core.step import TenantQuota
from pageframe.core.trace import TraceMode
from pageframe.core.units import is_power_of_two

ENV_PREFIX = "PAGEFRAME_"
CONFIG_VARIABLE = "PAGEFRAME_CONFIG"
CONFIG_FILE_NAME = "pageframe.toml"
EMBEDDED_MODEL = "smollm2-135m-instruct"

# Variables that begin like a setting and are none.
OTHER_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        "PAGEFRAME_MODELS_DIR",  # where prepared models are kept
        "PAGEFRAME_READY_FD",  # from the supervisor to its children
        "PAGEFRAME_SERVER",  # the server that client commands talk to
    }
)


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


def _default_state_dir() -> Path:
    xdg = os.environ.get("XDG_STATE_HOME")
    return Path(xdg) / "pageframe" if xdg else Path.home() / ".pageframe"


Count = Annotated[int, BeforeValidator(_number)]
Size = Annotated[int, BeforeValidator(_number), BeforeValidator(_kv_memory)]
Seconds = Annotated[float, BeforeValidator(_number), BeforeValidator(_duration)]
Dtype = Annotated[DtypeName, BeforeValidator(_dtype)]
KvDtype = Annotated[KvDtypeName, BeforeValidator(_dtype)]
_DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"


def _option_name(field_name: str) -> str:
    unitless = field_name.removesuffix("_bytes").removesuffix("_seconds")
    return unitless.replace("_", "-")


class Settings(BaseModel):
    """Everything a person may choose, checked. Fields carry units; option names do not.

    0 means "choose for me" wherever a count may be 0.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=_option_name,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    model: str = Field(
        EMBEDDED_MODEL, min_length=1, description="A prepared name, a folder or a Hugging Face id."
    )
    runner: RunnerName = Field(RunnerName.AUTO, description="Who computes a step.")
    device: str = Field(
        "auto", pattern=_DEVICE_PATTERN, description="auto, cpu, cuda or cuda:INDEX."
    )
    dtype: Dtype = Field(DtypeName.AUTO, description="Type of weights and activations.")
    kv_dtype: KvDtype = Field(KvDtypeName.AUTO, description="Type of cached keys and values.")
    block_size: Annotated[int, BeforeValidator(_block_size)] = Field(
        16, description="Tokens in one KV block; a power of two from 1 to 256."
    )
    num_blocks: Count = Field(0, ge=0, description="KV blocks; 0 takes them from kv-memory.")
    num_blocks_max: Count = Field(
        0, ge=0, description="KV blocks that the pool may grow to; 0 is four times num-blocks."
    )
    kv_memory_bytes: Size = Field(
        0, ge=0, description='Memory for KV blocks, such as "2GiB", or "auto".'
    )
    host_kv_memory_bytes: Size = Field(
        0, ge=0, description='Memory of the host tier, such as "4GiB"; 0 is none.'
    )
    prefix_cache: bool = Field(True, description="Share blocks of equal prefixes.")
    eviction_policy: str = Field(
        "lru", min_length=1, description="Which cached block goes first: lru, cost-aware or yours."
    )
    recovery: RecoveryName = Field(
        RecoveryName.RECOMPUTE, description="How a preempted sequence comes back."
    )
    tenant_quotas: Annotated[
        tuple[TenantQuota, ...],
        BeforeValidator(_tenant_quotas),
        PlainSerializer(format_tenant_quotas, when_used="json"),
    ] = Field((), description='TENANT=FLOOR:CEILING in blocks, separated by commas, or "off".')
    session_ttl_seconds: Seconds = Field(
        600.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time that the blocks of a chat are kept after a turn ("10m").',
    )
    session_idle_seconds: Seconds = Field(
        60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time until the blocks of an idle chat go to the host tier ("60s").',
    )
    token_budget: Count = Field(512, ge=1, le=1 << 20, description="Most new tokens in one step.")
    max_model_len: Count = Field(
        0, ge=0, description="Longest prompt and output together; 0 is the model's own."
    )
    max_num_sequences: Count = Field(
        256, ge=1, le=65536, description="Most sequences that run at once."
    )
    lookahead: bool = Field(True, description="Plan a step while the one before it runs.")
    trace: TraceMode = Field(
        TraceMode.ALL, description="audit is lossless, all may drop, sampled takes a share."
    )
    grpc: Annotated[str, BeforeValidator(_grpc)] = Field(
        "127.0.0.1:50051", description="HOST:PORT of the gateway; port 0 picks a free one."
    )
    http: Annotated[str | None, BeforeValidator(_http)] = Field(
        None, description='HOST:PORT of the HTTP door, or "off".'
    )
    state_dir: Annotated[Path, BeforeValidator(_path)] = Field(
        default_factory=_default_state_dir, description="Folder for logs, traces and sockets."
    )
    api_keys: Annotated[Path | None, BeforeValidator(_api_keys)] = Field(
        None,
        description='File of lines KEY TENANT [operator], or "off": then everybody is one tenant.',
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="Least severe log line written.")
    threads: Count = Field(
        0, ge=0, le=4096, description="CPU threads for computing; 0 is what the machine grants."
    )
    prefill_chunk_tokens: Count = Field(
        0, ge=0, description="Most tokens of one sequence's prefill in a step; 0 is no bound."
    )
    sim_step_seconds: Seconds = Field(
        0.002,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description='Time that each step of the sim runner takes ("2ms").',
    )
    drain_timeout_seconds: Seconds = Field(
        30.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time that running requests get to end ("30s").',
    )


class Sourced(NamedTuple):
    """A raw value and where it came from, as a person would find it again."""

    value: object
    origin: str


OPTION_FIELDS: Mapping[str, str] = {_option_name(name): name for name in Settings.model_fields}
"""Option name to field name, in the order of ``Settings``."""


def variable_name(option: str) -> str:
    """The environment variable of an option: ``PAGEFRAME_BLOCK_SIZE`` of ``block-size``."""
    return ENV_PREFIX + option.upper().replace("-", "_")


def load_settings(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    *,
    config_path: Path | None = None,
    working_dir: Path | None = None,
) -> Settings:
    """Lay flags over variables over the file over defaults, and check the result.

    Args:
        flags: Option name to value; None means that the flag was not given.
        environ: The environment; what does not begin with ``PAGEFRAME_`` is ignored.
        config_path: ``--config``; else ``PAGEFRAME_CONFIG``; else ``pageframe.toml`` when it is
            in ``working_dir``.
        working_dir: The current folder unless given.

    Raises:
        InvalidRequestError: ``SETTING_UNKNOWN`` or ``SETTING_MALFORMED``, one line that names the
            setting, its origin and what is allowed.
    """
    given = (
        _from_file(_find_file(config_path, environ, working_dir or Path.cwd()))
        | _from_environment(environ)
        | {
            option: Sourced(value, f"--{option}")
            for option, value in flags.items()
            if value is not None
        }
    )
    try:
        return Settings.model_validate({option: item.value for option, item in given.items()})
    except ValidationError as error:
        raise _malformed(error, given) from None


def _find_file(
    config_path: Path | None, environ: Mapping[str, str], working_dir: Path
) -> Path | None:
    named = config_path or environ.get(CONFIG_VARIABLE)
    if named:
        return Path(os.path.expanduser(named))
    found = working_dir / CONFIG_FILE_NAME
    return found if found.is_file() else None


def _from_file(path: Path | None) -> dict[str, Sourced]:
    if path is None:
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot read the settings file {path}: {error.strerror}"
        raise InvalidRequestError("SETTING_MALFORMED", message) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        message = f"the settings file {path} is not TOML: {error}"
        raise InvalidRequestError("SETTING_MALFORMED", message) from None
    settings = {}
    for key, value in content.items():
        option = key.replace("_", "-")
        if option not in OPTION_FIELDS:
            raise _unknown(f"{key} in {path}", option, list(OPTION_FIELDS))
        settings[option] = Sourced(value, f"{key} in {path}")
    return settings


def _from_environment(environ: Mapping[str, str]) -> dict[str, Sourced]:
    options = {variable_name(option): option for option in OPTION_FIELDS}
    settings = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in options:
            raise _unknown(f"{name} in the environment", name, list(options))
        settings[options[name]] = Sourced(value, name)
    return settings


def _unknown(where: str, name: str, allowed: list[str]) -> InvalidRequestError:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(allowed)}"
    return InvalidRequestError("SETTING_UNKNOWN", f"unknown setting {where}; {hint}")


def _malformed(error: ValidationError, given: Mapping[str, Sourced]) -> InvalidRequestError:
    first: Any = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    option = name if name in OPTION_FIELDS else _option_name(name)
    item = given[option]
    reason = first["msg"].removeprefix("Value error, ")
    if option == "device":
        reason = "must be auto, cpu, cuda or cuda:INDEX"
    reason = reason.replace("Input should be", "must be").replace("String should", "must")
    return InvalidRequestError(
        "SETTING_MALFORMED", f"malformed setting {item.origin}: {item.value!r} {reason}"
    )
