"""What a person may choose, and the four places where they may choose it.

    command line  >  PAGEFRAME_… variables  >  one TOML file  >  default

All four are laid over one another as ``{option name: (value, where it came from)}`` first and
checked once afterwards, so every message can name the origin and no place has rules of its own.
An option ``block-size`` is ``--block-size``, ``PAGEFRAME_BLOCK_SIZE`` and ``block-size = 16``.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from pageframe.config.memory_settings import MemorySettings
from pageframe.config.model_settings import ModelSettings
from pageframe.config.option_types import (
    ApiKeysFile,
    Count,
    Folder,
    GrpcAddress,
    HttpAddress,
    LogLevel,
    Seconds,
    Size,
    option_name,
)
from pageframe.config.routing_settings import RoutingSettings
from pageframe.config.scheduling_settings import SchedulingSettings
from pageframe.config.tls_settings import TlsSettings
from pageframe.config.variables import CONFIG_VARIABLE, ENV_PREFIX, OTHER_VARIABLES
from pageframe.core.errors import InvalidRequestError
from pageframe.core.trace import TraceMode

CONFIG_FILE_NAME = "pageframe.toml"


def _default_state_dir() -> Path:
    xdg = os.environ.get("XDG_STATE_HOME")
    return Path(xdg) / "pageframe" if xdg else Path.home() / ".pageframe"


METERED_SERVICES = ("gateway", "scheduler", "executor")
"""Who has a port for metrics, in the order of the ports."""


class Settings(TlsSettings, RoutingSettings, SchedulingSettings, MemorySettings, ModelSettings):
    """Everything a person may choose, checked.

    0 means "choose for me" wherever a count may be 0.
    """

    model_config = ConfigDict(defer_build=False)

    trace: TraceMode = Field(
        TraceMode.ALL, description="audit is lossless, all may drop, sampled takes a share."
    )
    grpc: GrpcAddress = Field(
        "127.0.0.1:50051", description="HOST:PORT of the gateway; port 0 picks a free one."
    )
    http: HttpAddress = Field(
        "127.0.0.1:8000",
        description="HOST:PORT of the gateway's HTTP door (OpenAI's API), or \"off\".",
    )
    metrics_port: Count = Field(
        9464,
        ge=0,
        le=65533,
        description="First of three ports, for the metrics of gateway, scheduler and executor; "
        "0 for none.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of this machine on which those ports are; 0.0.0.0 for all of them.",
    )
    state_dir: Folder = Field(
        default_factory=_default_state_dir, description="Folder for logs, traces and sockets."
    )
    spool_size_bytes: Size = Field(
        1 << 30, ge=1 << 20, description="Most bytes of traces that wait on disk to be sent."
    )
    api_keys: ApiKeysFile = Field(
        None,
        description='File of keys and of what tenants may have, or "off": then everybody is one '
        "tenant.",
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="Least severe log line written.")
    drain_timeout_seconds: Seconds = Field(
        30.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description='Time that running requests get to end ("30s").',
    )

    def metrics_port_of(self, service: str) -> int:
        """The port where a service tells its metrics; 0 for none."""
        return self.metrics_port and self.metrics_port + METERED_SERVICES.index(service)


class Sourced(NamedTuple):
    """A raw value and where it came from, as a person would find it again."""

    value: object
    origin: str


OPTION_FIELDS: Mapping[str, str] = {option_name(name): name for name in Settings.model_fields}
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
    option = name if name in OPTION_FIELDS else option_name(name)
    item = given[option]
    reason = first["msg"].removeprefix("Value error, ")
    if option == "device":
        reason = "must be auto, cpu, cuda or cuda:INDEX"
    reason = reason.replace("Input should be", "must be").replace("String should", "must")
    return InvalidRequestError(
        "SETTING_MALFORMED", f"malformed setting {item.origin}: {item.value!r} {reason}"
    )
