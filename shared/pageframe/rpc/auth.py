"""Who is calling: API keys to tenants, and the salt that keeps tenants' cached prefixes apart."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from pageframe.core.errors import InvalidRequestError, PermissionDeniedError, UnauthenticatedError

DEFAULT_TENANT = "default"
_OPERATOR = "operator"

# Without a secret of its own a deployment still keeps its tenants apart; the secret only keeps
# salts unguessable for somebody who can talk to the executor directly.
_SALT_DOMAIN = b"pageframe/tenant-salt/1"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is behind a key.

    Attributes:
        tenant: Whose requests, blocks and handles are the caller's own.
        is_operator: Whether it may change what concerns all tenants, and see whose blocks are
            whose.
    """

    tenant: str
    is_operator: bool = False

    def check_operator(self, action: str) -> None:
        """Refuse a caller that is no operator.

        Raises:
            PermissionDeniedError: reason OPERATOR_NEEDED.
        """
        if not self.is_operator:
            raise PermissionDeniedError(
                "OPERATOR_NEEDED",
                f"{action} is for operators, and the key of tenant {self.tenant} is not one's",
                tenant=self.tenant,
            )


_EVERYBODY = Caller(DEFAULT_TENANT, is_operator=True)


class Authenticator:
    """Tells the caller behind a call from its ``authorization`` metadata."""

    def __init__(self, caller_of_key: Mapping[str, Caller], secret: bytes = b"") -> None:
        """``caller_of_key`` empty lets everybody in as ``default``; ``secret`` keys the salts."""
        # Keys are kept and looked up by digest: how long a look-up takes tells nothing of a key.
        self._caller_of_digest = {_digest(key): caller for key, caller in caller_of_key.items()}
        self._secret = secret or _SALT_DOMAIN

    def caller(self, authorization: str | None) -> Caller:
        """Who is behind ``Bearer KEY``; without configured keys everybody is an operator.

        Raises:
            UnauthenticatedError: reason CREDENTIALS_MISSING or CREDENTIALS_UNKNOWN; never when no
                keys are configured.
        """
        if not self._caller_of_digest:
            return _EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthenticatedError(
                "CREDENTIALS_MISSING", "send an API key as metadata `authorization: Bearer KEY`"
            )
        caller = self._caller_of_digest.get(_digest(key.strip()))
        if caller is None:
            raise UnauthenticatedError("CREDENTIALS_UNKNOWN", "the API key is not known")
        return caller

    def tenant(self, authorization: str | None) -> str:
        """The tenant behind ``Bearer KEY``.

        Raises:
            UnauthenticatedError: as ``caller`` does.
        """
        return self.caller(authorization).tenant

    def cache_salt(self, tenant: str) -> bytes:
        """32 bytes that go into every key of the tenant's cached prefixes."""
        return hmac.digest(self._secret, tenant.encode("utf-8"), "sha256")


def authorization_of(context: "grpc.aio.ServicerContext[Any, Any]") -> str | None:
    """The ``authorization`` metadata of a call, or None when it sent none."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return None


def read_api_keys(path: Path) -> dict[str, Caller]:
    """Read a file of lines ``KEY TENANT`` or ``KEY TENANT operator``.

    Empty lines and lines that begin with ``#`` are skipped.

    Raises:
        InvalidRequestError: reason API_KEYS_UNREADABLE or API_KEYS_MALFORMED, with the line number;
            keys are never repeated in a message.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "API_KEYS_UNREADABLE", f"cannot read the API keys in {path}: {error}", path=path
        ) from error
    caller_of_key: dict[str, Caller] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        has_right_form = len(words) == 2 or (len(words) == 3 and words[2] == _OPERATOR)
        if not has_right_form or words[0] in caller_of_key:
            raise InvalidRequestError(
                "API_KEYS_MALFORMED",
                f"line {number} of {path} is not a new key, its tenant, and perhaps `operator`",
                path=path,
                line=number,
            )
        caller_of_key[words[0]] = Caller(words[1], is_operator=len(words) == 3)
    return caller_of_key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
