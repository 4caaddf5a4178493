"""Names of retained prefixes, and what makes repeated calls harmless.

A handle is a digest of tenant and request id, so a caller that repeats a call, perhaps to an
executor that has restarted since, gets the name that it got before. What was asked for under which
name, and what was released, is remembered for the latest few thousand.
"""

import hashlib
import secrets
import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

from pageframe.core.errors import AlreadyExistsError, InvalidRequestError, OutOfRangeError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.sampling import check_token_id

NUM_REMEMBERED_MAX: Final = 4096
"""How many retained and how many released handles are remembered."""

TENANT_BYTES_MAX: Final = 256
"""Longest name of a tenant, as in a packed trace record."""

_DOMAIN: Final = b"pageframe/handle/1"
_NAME_BYTES: Final = 16
_Value = TypeVar("_Value")


class _Asked(NamedTuple):
    """What a handle stands for, and until when, nanoseconds since the Unix epoch."""

    prefix_digest: bytes
    expire_ns: int


class Handles:
    """Names for ``Retain`` and a short memory of what they were used for."""

    def __init__(self) -> None:
        self._asked: OrderedDict[tuple[str, str], _Asked] = OrderedDict()
        self._released: OrderedDict[tuple[str, str], None] = OrderedDict()

    def name_for(self, tenant: str, request_id: str, token_ids: Sequence[int], now_ns: int) -> str:
        """The handle's name: of the request id when there is one, else a new one.

        Raises:
            AlreadyExistsError: reason REQUEST_ID_REUSED, the request id stands for other tokens.
        """
        if not request_id:
            return secrets.token_hex(_NAME_BYTES)
        fields = (tenant.encode("utf-8"), request_id.encode("utf-8"))
        content = b"".join(struct.pack("<Q", len(field)) + field for field in fields)
        name = hashlib.sha256(_DOMAIN + content).hexdigest()[: 2 * _NAME_BYTES]
        asked = self._asked.get((tenant, name))
        is_other = asked is not None and asked.prefix_digest != _digest(token_ids)
        if asked is not None and is_other and asked.expire_ns > now_ns:
            raise AlreadyExistsError(
                "REQUEST_ID_REUSED",
                f"request id {request_id!r} has retained other tokens; release handle {name} first",
                handle=name,
            )
        return name

    def note_retained(
        self, tenant: str, name: str, token_ids: Sequence[int], expire_ns: int
    ) -> None:
        """The handle stands for these tokens until then."""
        self._released.pop((tenant, name), None)
        _remember(self._asked, (tenant, name), _Asked(_digest(token_ids), expire_ns))

    def note_released(self, tenant: str, name: str) -> None:
        """The handle was given back."""
        self._asked.pop((tenant, name), None)
        _remember(self._released, (tenant, name), None)

    def was_released(self, tenant: str, name: str) -> bool:
        """Whether this tenant gave back this handle, as far as that is remembered."""
        return (tenant, name) in self._released


def check_prefix(token_ids: Sequence[int], facts: ReplicaFacts) -> None:
    """Refuse a prefix that no sequence of this replica could have.

    Raises:
        InvalidRequestError: reason PREFIX_EMPTY or TOKEN_ID_OUT_OF_RANGE.
        OutOfRangeError: reason PREFIX_TOO_LONG.
    """
    if not token_ids:
        raise InvalidRequestError("PREFIX_EMPTY", "the prefix has no tokens", num_tokens=0)
    if len(token_ids) > facts.max_model_len:
        raise OutOfRangeError(
            "PREFIX_TOO_LONG",
            f"the prefix has {len(token_ids)} tokens; a sequence has at most {facts.max_model_len}",
            num_tokens=len(token_ids),
            max_model_len=facts.max_model_len,
        )
    check_token_id("token_ids", max(token_ids), facts.vocab_size)


def check_request_id(request_id: str) -> None:
    """Refuse a request id that is too long.

    Raises:
        InvalidRequestError: reason REQUEST_ID_TOO_LONG.
    """
    _check_bytes("request_id", request_id, LIMITS.request_id_bytes_max)


def check_tenant(tenant: str) -> None:
    """Refuse a tenant's name that is missing or too long.

    Raises:
        InvalidRequestError: reason TENANT_MISSING or TENANT_TOO_LONG.
    """
    if not tenant:
        raise InvalidRequestError("TENANT_MISSING", "say whose bounds: quota.tenant")
    _check_bytes("tenant", tenant, TENANT_BYTES_MAX)


def _check_bytes(field_name: str, text: str, num_bytes_max: int) -> None:
    num_bytes = len(text.encode("utf-8"))
    if num_bytes > num_bytes_max:
        raise InvalidRequestError(
            f"{field_name.upper()}_TOO_LONG",
            f"{field_name} has {num_bytes} bytes; at most {num_bytes_max} are allowed",
            num_bytes=num_bytes,
            num_bytes_max=num_bytes_max,
        )


def _digest(token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(array("I", token_ids).tobytes()).digest()


def _remember(
    book: OrderedDict[tuple[str, str], _Value], key: tuple[str, str], value: _Value
) -> None:
    book[key] = value
    book.move_to_end(key)
    if len(book) > NUM_REMEMBERED_MAX:
        book.popitem(last=False)
