"""Who may call, and what each tenant may have: one file of lines, read by every service.

    sha256:9f86d081…   alice                    a key, by its digest, and whose it is
    sha256:60303ae2…   ops     operator         an operator's
    tenant alice weight=3 blocks=100:500 requests-per-minute=600 tokens-per-minute=100000

The gateway and the executor use the keys, the scheduler the terms of tenants; none of them asks
another. A key may also stand there as it is, which is for trials: who reads the file then has it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pageframe.config.values import parse_tenant_quotas, parse_tenant_weights
from pageframe.core.errors import InvalidRequestError
from pageframe.core.replica import TenantQuota
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.rpc.auth import Caller

_OPERATOR = "operator"
_TENANT = "tenant"
_WEIGHT = "weight"
_BLOCKS = "blocks"
_REQUESTS = "requests-per-minute"
_TOKENS = "tokens-per-minute"
_NUM_PER_MINUTE_MAX = 10**12
_COUNT = re.compile(r"[1-9][0-9]{0,12}")
_NAME = re.compile(r"[^=,:\s]+")


@dataclass(frozen=True, slots=True)
class Access:
    """What an access file says.

    Attributes:
        caller_of_key: Who is behind a key; keys as they stand in the file.
        terms: What tenants may have.
    """

    caller_of_key: Mapping[str, Caller] = field(default_factory=dict)
    terms: TenantTerms = field(default_factory=TenantTerms)


def read_access(path: Path) -> Access:
    """Read an access file. Empty lines and lines that begin with ``#`` are skipped.

    Raises:
        InvalidRequestError: reason API_KEYS_UNREADABLE; API_KEYS_MALFORMED, with the line number;
            or API_KEYS_EMPTY, for a file without any key. Keys are never repeated in a message.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "API_KEYS_UNREADABLE", f"cannot read the API keys in {path}: {error}", path=path
        ) from error
    reading = _Reading()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            reading.take(words)
        except ValueError as error:
            raise InvalidRequestError(
                "API_KEYS_MALFORMED", f"line {number} of {path} {error}", path=path, line=number
            ) from None
    if not reading.caller_of_key:
        # Without keys everybody is let in, and nobody writes a file to have that.
        raise InvalidRequestError(
            "API_KEYS_EMPTY", f"there is no key in {path}; `off` lets everybody in", path=path
        )
    return reading.access()


class _Reading:
    """What the lines so far have said. Errors are ends of a sentence about the line."""

    def __init__(self) -> None:
        self.caller_of_key: dict[str, Caller] = {}
        self._tenants: set[str] = set()
        self._weights: dict[str, float] = {}
        self._quotas: list[TenantQuota] = []
        self._rates: list[TenantRate] = []

    def take(self, words: list[str]) -> None:
        if words[0] == _TENANT and len(words) > 1:
            self._take_tenant(words[1], words[2:])
        else:
            self._take_key(words)

    def access(self) -> Access:
        terms = TenantTerms(
            weights=self._weights, quotas=tuple(self._quotas), rates=tuple(self._rates)
        )
        return Access(self.caller_of_key, terms)

    def _take_key(self, words: list[str]) -> None:
        has_right_form = len(words) == 2 or (len(words) == 3 and words[2] == _OPERATOR)
        if not has_right_form or words[0] in self.caller_of_key:
            raise ValueError("is not a new key, its tenant, and perhaps `operator`")
        self.caller_of_key[words[0]] = Caller(words[1], is_operator=len(words) == 3)

    def _take_tenant(self, tenant: str, words: list[str]) -> None:
        if tenant in self._tenants or not _NAME.fullmatch(tenant):
            raise ValueError("names a tenant a second time, or with one of `=,:` in its name")
        self._tenants.add(tenant)
        given: dict[str, str] = {}
        for word in words:
            name, separator, value = word.partition("=")
            if not separator or name not in (_WEIGHT, _BLOCKS, _REQUESTS, _TOKENS) or name in given:
                raise ValueError(
                    f"is not `{_TENANT} NAME` with {_WEIGHT}=, {_BLOCKS}=, {_REQUESTS}= and "
                    f"{_TOKENS}=, each once at most"
                )
            given[name] = value
        if _WEIGHT in given:
            self._weights.update(parse_tenant_weights(f"{tenant}={given[_WEIGHT]}"))
        if _BLOCKS in given:
            self._quotas += parse_tenant_quotas(f"{tenant}={given[_BLOCKS]}")
        if _REQUESTS in given or _TOKENS in given:
            self._rates.append(
                TenantRate(
                    tenant=tenant,
                    num_requests_per_minute=_number_per_minute(given, _REQUESTS),
                    num_tokens_per_minute=_number_per_minute(given, _TOKENS),
                )
            )


def _number_per_minute(given: Mapping[str, str], name: str) -> int:
    value = given.get(name)
    if value is None:
        return 0
    if not _COUNT.fullmatch(value) or int(value) > _NUM_PER_MINUTE_MAX:
        raise ValueError(f"has {name}={value[:40]}; it must lie in [1, {_NUM_PER_MINUTE_MAX}]")
    return int(value)
