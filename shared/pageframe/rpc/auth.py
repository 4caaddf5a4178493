"""Who is calling: API keys to tenants, and the salt that keeps tenants' cached prefixes apart."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from pageframe.core.errors import PermissionDeniedError, UnauthenticatedError

DEFAULT_TENANT = "default"
_HASHED = "sha256:"
_HASHED_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})")

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
        """``caller_of_key`` as of ``adopt``; ``secret`` keys the salts."""
        self._blind = os.urandom(32)
        self.adopt(caller_of_key)
        self._secret = secret or _SALT_DOMAIN

    def adopt(self, caller_of_key: Mapping[str, Caller]) -> None:
        """These keys from now on; if there is none, everybody is let in as ``default``.

        A key is what callers send, or ``sha256:`` and its digest in hexadecimal digits.
        """
        self._caller_of_key = {
            self._blinded(_digest_in_file(word)): caller for word, caller in caller_of_key.items()
        }

    def caller(self, authorization: str | None) -> Caller:
        """Who is behind ``Bearer KEY``; without configured keys everybody is an operator.

        Raises:
            UnauthenticatedError: reason CREDENTIALS_MISSING or CREDENTIALS_UNKNOWN; never when no
                keys are configured.
        """
        if not self._caller_of_key:
            return _EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthenticatedError(
                "CREDENTIALS_MISSING", "send an API key as metadata `authorization: Bearer KEY`"
            )
        caller = self._caller_of_key.get(self._blinded(_digest(key.strip())))
        if caller is None:
            raise UnauthenticatedError("CREDENTIALS_UNKNOWN", "the API key is not known")
        return caller

    def tenant(self, authorization: str | None) -> str:
        """The tenant behind ``Bearer KEY``.

        Raises:
            UnauthenticatedError: as ``caller`` does.
        """
        return self.caller(authorization).tenant

    def _blinded(self, digest: bytes) -> bytes:
        # Looked up by a keyed digest whose key nobody knows: how long that takes, and how far a
        # comparison came, says nothing of any key, nor of its digest in the file.
        return hmac.digest(self._blind, digest, "sha256")

    def cache_salt(self, tenant: str) -> bytes:
        """32 bytes that go into every key of the tenant's cached prefixes."""
        return hmac.digest(self._secret, tenant.encode("utf-8"), "sha256")


def authorization_of(context: "grpc.aio.ServicerContext[Any, Any]") -> str | None:
    """The ``authorization`` metadata of a call, or None when it sent none."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return None


def hashed_key(key: str) -> str:
    """A key as it may stand in a file that others can read: ``sha256:`` and its digest."""
    return _HASHED + _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


def _digest_in_file(word: str) -> bytes:
    match = _HASHED_KEY.fullmatch(word)
    return bytes.fromhex(match[1]) if match else _digest(word)
