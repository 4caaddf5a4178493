"""Which replica a request goes to: where its first tokens have been computed, unless that is busy.

    prompt ─▶ key ─▶ replicas in the key's own order ─▶ the first that is not over its bound

The order is that of rendezvous hashing (Thaler and Ravishankar, 1998): every replica is scored by
a hash of key and name, and the highest comes first. So all gateways choose alike and keep nothing,
and when a replica goes only its own keys move, each to the replica that was its second. The bound
is that of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): no
replica takes more than ``1 + headroom`` times the mean. A prefix that many ask for therefore comes
to lie on as many replicas as it needs, and always on the same ones.
"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

GRANULE_TOKENS: Final = 64
"""A prompt is cut to whole granules, so that prompts of nearly one length have the same key."""

_PREFIX_DOMAIN: Final = b"pageframe/route/prefix/1"
_SESSION_DOMAIN: Final = b"pageframe/route/session/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """How far routing by prefix goes.

    Attributes:
        num_prefix_tokens: Prompts that share this many tokens go to the same replica. Sharing fewer
            is not worth a place: the tokens are quickly computed again.
        headroom: How far above the mean a replica may be and still take requests.
        num_light: Requests up to which a replica is never over its bound: of a few, any split is
            far from the mean, and none is a burden.
    """

    num_prefix_tokens: int = 256
    headroom: float = 0.25
    num_light: int = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A replica that could take a request.

    Attributes:
        name: The same at all gateways.
        num_requests: Requests of this gateway that live there.
        is_full: It has refused a request for want of room a moment ago.
    """

    name: str
    num_requests: int
    is_full: bool = False


def prefix_key(salt: bytes, token_ids: Sequence[int], num_tokens_max: int) -> bytes:
    """32 bytes that prompts of one tenant share when they begin alike.

    ``token_ids`` are cut to ``num_tokens_max``, and then to whole granules; a prompt of less than a
    granule counts as a whole.
    """
    num_tokens = min(len(token_ids), num_tokens_max)
    num_tokens = num_tokens // GRANULE_TOKENS * GRANULE_TOKENS or num_tokens
    tokens = array("I", token_ids[:num_tokens]).tobytes()
    return hashlib.sha256(_PREFIX_DOMAIN + _framed(salt) + tokens).digest()


def session_key(salt: bytes, name: str) -> bytes:
    """32 bytes that all turns of one tenant's session share."""
    return hashlib.sha256(_SESSION_DOMAIN + _framed(salt) + name.encode("utf-8")).digest()


def rendezvous_order(key: bytes, names: Sequence[str]) -> list[str]:
    """``names`` as this key prefers them; without one of them, the others keep their order."""
    scores = {name: hashlib.sha256(key + name.encode("utf-8")).digest() for name in names}
    return sorted(names, key=lambda name: (scores[name], name), reverse=True)


def load_bound(places: Sequence[Place], options: RoutingOptions) -> int:
    """Most requests that one of ``places`` may have with the one that comes now."""
    num_requests = 1 + sum(place.num_requests for place in places)
    mean = num_requests / len(places)
    return max(options.num_light, math.ceil((1 + options.headroom) * mean))


def choose(places: Sequence[Place], options: RoutingOptions) -> Place:
    """The first of ``places``, which are in the order of preference, that has room.

    Where only full ones are left, the one with the fewest requests: it may have room again.
    """
    bound = load_bound(places, options)
    for place in places:
        if not place.is_full and place.num_requests < bound:
            return place
    return min(places, key=lambda place: (place.is_full, place.num_requests))


def _framed(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content
