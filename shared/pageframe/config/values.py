"""Words that people write in settings, made into values: sizes, durations, addresses, quotas."""

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

from pageframe.core.replica import TenantQuota

_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 1024,
    "MIB": 1024**2,
    "GIB": 1024**3,
    "TIB": 1024**4,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_QUOTA = re.compile(r"\s*([^=,:\s]+)\s*=\s*(\d+)\s*:\s*(\d*)\s*")
_WEIGHT = re.compile(r"\s*([^=,:\s]+)\s*=\s*(-?\d+(?:\.\d+)?)\s*")
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
PORT_MAX = 65535
WEIGHT_MIN = 0.001
WEIGHT_MAX = 1000


class HostPort(NamedTuple):
    """A TCP address; port 0 asks the system for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_size_bytes(text: str) -> int:
    """Bytes of ``"2GiB"``, ``"512 MiB"``, ``"1.5GB"`` or ``"4096"``.

    Raises:
        ValueError: with what is allowed.
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise ValueError('must be a size such as "2GiB", "512MiB" or "1048576" (bytes)')
    return int(Decimal(match[1]) * _SIZE_UNITS[match[2].upper()])


def parse_duration_seconds(text: str) -> float:
    """Seconds of ``"30"``, ``"30s"``, ``"500ms"`` or ``"2m"``.

    Raises:
        ValueError: with what is allowed.
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError('must be a duration such as "30s", "500ms", "2m" or "30" (seconds)')
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_host_port(text: str) -> HostPort:
    """``HOST:PORT``; an IPv6 host stands in brackets.

    Raises:
        ValueError: with what is allowed.
    """
    host, separator, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        separator = ""  # an IPv6 host without brackets: where the port begins is a guess
    if not separator or not host or not port.isascii() or not port.isdecimal():
        raise ValueError('must be HOST:PORT, such as "127.0.0.1:50051" or "[::1]:50051"')
    if int(port) > PORT_MAX:
        raise ValueError(f"has port {port}; the largest is {PORT_MAX}")
    return HostPort(host, int(port))


DNS_PREFIX = "dns:///"


def parse_targets(text: str) -> tuple[str, ...]:
    """Where several of a kind are reached: ``HOST:PORT``, ``unix:/PATH``, ``dns:///NAME:PORT``.

    Commas stand between them.

    Raises:
        ValueError: with what is allowed.
    """
    targets = tuple(target.strip() for target in text.split(","))
    for target in targets:
        if not target.startswith("unix:/"):
            parse_host_port(target.removeprefix(DNS_PREFIX))
    return targets


def parse_tenant_quotas(text: str) -> tuple[TenantQuota, ...]:
    """Quotas of ``"alice=100:500,bob=0:"``: floor and ceiling in blocks; no ceiling if left out.

    ``""`` and ``"off"`` are no quotas.

    Raises:
        ValueError: with what is allowed.
    """
    if text.strip() in ("", "off"):
        return ()
    quotas: dict[str, TenantQuota] = {}
    for entry in text.split(","):
        match = _QUOTA.fullmatch(entry)
        if match is None:
            raise ValueError(
                'must be TENANT=FLOOR:CEILING in blocks, such as "alice=100:500,bob=0:"'
            )
        tenant, floor, ceiling = match[1], int(match[2]), int(match[3]) if match[3] else None
        if tenant in quotas:
            raise ValueError(f"names tenant {tenant!r} twice")
        if ceiling is not None and floor > ceiling:
            raise ValueError(
                f"has a floor of {floor} above the ceiling of {ceiling} for {tenant!r}"
            )
        quotas[tenant] = TenantQuota(tenant=tenant, floor_blocks=floor, ceiling_blocks=ceiling)
    return tuple(quotas.values())


def format_tenant_quotas(quotas: Iterable[TenantQuota]) -> str:
    """The words that ``parse_tenant_quotas`` reads."""
    entries = [
        f"{quota.tenant}={quota.floor_blocks}:"
        + ("" if quota.ceiling_blocks is None else str(quota.ceiling_blocks))
        for quota in quotas
    ]
    return ",".join(entries) or "off"


def parse_tenant_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Tenants and weights of ``"alice=3,bob=0.5"``.

    ``""`` and ``"off"`` are none.

    Raises:
        ValueError: with what is allowed.
    """
    if text.strip() in ("", "off"):
        return ()
    weights: dict[str, float] = {}
    for entry in text.split(","):
        match = _WEIGHT.fullmatch(entry)
        if match is None:
            raise ValueError('must be TENANT=WEIGHT,... such as "alice=3,bob=0.5"')
        tenant, weight = match[1], float(match[2])
        if tenant in weights:
            raise ValueError(f"names tenant {tenant!r} twice")
        if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
            raise ValueError(
                f"has a weight of {match[2]} for {tenant!r}; "
                f"it must lie in [{WEIGHT_MIN}, {WEIGHT_MAX}]"
            )
        weights[tenant] = weight
    return tuple(weights.items())


def format_tenant_weights(weights: Iterable[tuple[str, float]]) -> str:
    """The words that ``parse_tenant_weights`` reads."""
    return ",".join(f"{tenant}={weight:g}" for tenant, weight in weights) or "off"


def parse_policy_names(text: str) -> tuple[tuple[str, str], ...]:
    """Groups and names of ``"victim=youngest,recovery=swap"``.

    ``""`` and ``"off"`` are none.

    Raises:
        ValueError: with what is allowed.
    """
    if text.strip() in ("", "off"):
        return ()
    names: dict[str, str] = {}
    for entry in text.split(","):
        group, separator, name = (part.strip() for part in entry.partition("="))
        if not (group and separator and name):
            raise ValueError('must be GROUP=NAME,... such as "victim=youngest,recovery=swap"')
        if group in names:
            raise ValueError(f"names group {group!r} twice")
        names[group] = name
    return tuple(names.items())


def format_policy_names(names: Iterable[tuple[str, str]]) -> str:
    """The words that ``parse_policy_names`` reads."""
    return ",".join(f"{group}={name}" for group, name in names) or "off"


def format_size(num_bytes: float) -> str:
    """For people: ``"1.5 GiB"``, ``"300 MiB"``, ``"12 KiB"``."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1024:.3g} KiB"
