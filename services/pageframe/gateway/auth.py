"""Who is calling: API keys to tenants, and the salt that keeps tenants' cached prefixes apart."""

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from pageframe.core.errors import InvalidRequestError, UnauthenticatedError

DEFAULT_TENANT = "default"

# Without a secret of its own a deployment still keeps its tenants apart; the secret only keeps
# salts unguessable for somebody who can talk to the executor directly.
_SALT_DOMAIN = b"pageframe/tenant-salt/1"


class Authenticator:
    """Tells the tenant of a call from its ``authorization`` metadata."""

    def __init__(self, tenant_of_key: Mapping[str, str], secret: bytes = b"") -> None:
        """``tenant_of_key`` empty lets everybody in as ``default``; ``secret`` keys the salts."""
        # Keys are kept and looked up by digest: how long a look-up takes tells nothing of a key.
        self._tenant_of_digest = {_digest(key): name for key, name in tenant_of_key.items()}
        self._secret = secret or _SALT_DOMAIN

    def tenant(self, authorization: str | None) -> str:
        """The tenant behind ``Bearer KEY``.

        Raises:
            UnauthenticatedError: reason CREDENTIALS_MISSING or CREDENTIALS_UNKNOWN; never when no
                keys are configured.
        """
        if not self._tenant_of_digest:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthenticatedError(
                "CREDENTIALS_MISSING", "send an API key as metadata `authorization: Bearer KEY`"
            )
        tenant = self._tenant_of_digest.get(_digest(key.strip()))
        if tenant is None:
            raise UnauthenticatedError("CREDENTIALS_UNKNOWN", "the API key is not known")
        return tenant

    def cache_salt(self, tenant: str) -> bytes:
        """32 bytes that go into every key of the tenant's cached prefixes."""
        return hmac.digest(self._secret, tenant.encode("utf-8"), "sha256")


def read_api_keys(path: Path) -> dict[str, str]:
    """Read a file of lines ``KEY TENANT``; empty lines and lines that begin with ``#`` are skipped.

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
    tenant_of_key: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] in tenant_of_key:
            raise InvalidRequestError(
                "API_KEYS_MALFORMED",
                f"line {number} of {path} is not a new key and its tenant",
                path=path,
                line=number,
            )
        tenant_of_key[words[0]] = words[1]
    return tenant_of_key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
