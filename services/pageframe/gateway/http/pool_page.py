"""The pool page: ``/pool`` and what it asks for while somebody looks at it.

    /pool                the page; says nothing of the pool, so anybody may load it
    /pool/FILE           its scripts, styles and libraries, from the package
    /pool/replicas       how full the pool of each replica is; for a caller
    /pool/events         how a pool is and what changes, as server-sent events; for a caller
    /pool/blocks/NUMBER  who holds one block, why and since when; for a caller

The last two are of the first replica, or of the one named by ``?replica=``.
Callers are told apart as everywhere at this door. The page sends its key with ``fetch``, since a
browser's own reader of such events can send no header.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from starlette.routing import Route

from pageframe.client.kv_memory_aio import KvMemoryClients
from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError, NotFoundError, ResourceExhaustedError
from pageframe.gateway.http.exchange import Endpoint, Exchange, encode_json
from pageframe.gateway.http.pool_feed import PoolFeed
from pageframe.gateway.http.pool_replicas import OpenClients, PoolReplicas
from pageframe.gateway.http.pool_stalls import sample_stalls
from pageframe.rpc.addresses import ReplicaAddresses
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading
from pageframe.wire.memory_facts import BlockExplanation
from pageframe.wire.memory_json import explanation_to_json, pools_to_json

NUM_VIEWERS_MAX: Final = 64
"""How many browsers may look at the same time; each is a connection."""

NUM_FEEDS_MAX: Final = 8
"""How many callers may look at one pool at the same time; each costs its executor a watch."""

FILES: Final = Path(__file__).parent.parent / "pool_page"
"""The page, as files of this package."""

_INDEX: Final = "index.html"
_CONTENT_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS: Final = {
    # Nothing but what comes from here: no script in a name that somebody chose is ever run.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_BLOCK_ID_MAX: Final = 2**32 - 1


class PoolPage:
    """Answers for the page. For one event loop.

    Args:
        executors: Where the executors of all replicas are.
        authenticator: Tells callers.
        clock: Source of time.
        readings: The gateway's metrics.
        open_clients: Makes the clients of the executor at an address.
    """

    def __init__(
        self,
        executors: ReplicaAddresses,
        authenticator: Authenticator,
        clock: Clock,
        readings: Callable[[], Iterable[Reading]],
        open_clients: OpenClients = KvMemoryClients,
    ) -> None:
        self._replicas = PoolReplicas(executors, clock, self._is_watched, open_clients)
        self._authenticator = authenticator
        self._clock = clock
        self._readings = readings
        # By the executor's address and the caller's credentials.
        self._feeds: dict[tuple[str, str | None], PoolFeed] = {}
        # Of feeds that are gone.
        self._num_resets = 0
        self._files = {path.name: path for path in FILES.iterdir() if path.is_file()}

    @property
    def num_viewers(self) -> int:
        """How many browsers look now."""
        return sum(feed.num_viewers for feed in self._feeds.values())

    def readings(self) -> Iterator[Reading]:
        """What is counted here, for metrics."""
        yield Reading(metrics.POOL_VIEWERS, self.num_viewers)
        num_resets = self._num_resets + sum(feed.num_resets for feed in self._feeds.values())
        yield Reading(metrics.POOL_VIEWER_RESETS, num_resets)

    def routes(self) -> list[Route]:
        """What is behind each path."""
        return [
            Route("/pool", Endpoint(self._page), methods=["GET"]),
            Route("/pool/replicas", Endpoint(self._pools), methods=["GET"]),
            Route("/pool/events", Endpoint(self._events), methods=["GET"]),
            Route("/pool/blocks/{block_id}", Endpoint(self._block), methods=["GET"]),
            Route("/pool/{name}", Endpoint(self._file), methods=["GET"]),
        ]

    def close(self) -> None:
        """End all views, which never end by themselves."""
        for feed in self._feeds.values():
            feed.close()

    async def stop(self) -> None:
        """Let go of the executors."""
        self.close()
        await self._replicas.close()

    async def _page(self, exchange: Exchange) -> None:
        await self._send_file(exchange, _INDEX)

    async def _file(self, exchange: Exchange) -> None:
        await self._send_file(exchange, exchange.path_params["name"])

    async def _send_file(self, exchange: Exchange, name: str) -> None:
        path = self._files.get(name)
        if path is None or path.suffix not in _CONTENT_TYPES:
            raise NotFoundError("UNKNOWN_URL", f"there is nothing at /pool/{name[:200]}")
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = _HEADERS | {"etag": tag}
        if exchange.headers.get("if-none-match") == tag:
            await exchange.answer(304, b"", headers, content_type=_CONTENT_TYPES[path.suffix])
            return
        await exchange.answer(200, data, headers, content_type=_CONTENT_TYPES[path.suffix])

    async def _pools(self, exchange: Exchange) -> None:
        self._caller(exchange)
        pools = await exchange.while_connected(self._replicas.pools())
        await exchange.answer(200, encode_json(pools_to_json(pools)), _HEADERS)

    async def _events(self, exchange: Exchange) -> None:
        authorization, caller = self._caller(exchange)
        address = await exchange.while_connected(self._address(exchange))
        if self.num_viewers >= NUM_VIEWERS_MAX:
            raise ResourceExhaustedError(
                "VIEWERS_FULL",
                f"{self.num_viewers} browsers look at the pool already; at most "
                f"{NUM_VIEWERS_MAX} may",
                num_viewers=self.num_viewers,
                num_viewers_max=NUM_VIEWERS_MAX,
            )
        key = (address, authorization)
        feed = self._feed(key, caller)
        try:
            await exchange.while_connected(self._send_views(exchange, feed))
        finally:
            if not feed.num_viewers and self._feeds.get(key) is feed:
                del self._feeds[key]
                self._num_resets += feed.num_resets

    async def _send_views(self, exchange: Exchange, feed: PoolFeed) -> None:
        async with feed.joined():
            await exchange.begin_stream(_HEADERS)
            async for view in feed.views():
                await exchange.send_encoded(view)
            await exchange.end_stream()

    async def _block(self, exchange: Exchange) -> None:
        _, caller = self._caller(exchange)
        text = exchange.path_params["block_id"]
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise InvalidRequestError("FIELD_MALFORMED", f"{text[:40]!r} is no number of a block")
        if int(text) > _BLOCK_ID_MAX:
            raise NotFoundError("BLOCK_UNKNOWN", f"no pool has a block {text}", block_id=text)
        explanation = await exchange.while_connected(self._explain(exchange, int(text)))
        answer = explanation_to_json(_told_to(caller, explanation))
        await exchange.answer(200, encode_json(answer), _HEADERS)

    async def _explain(self, exchange: Exchange, block_id: int) -> BlockExplanation:
        address = await self._address(exchange)
        authorization, _ = self._caller(exchange)
        feed = self._feeds.get((address, authorization))
        client = self._replicas.client(address, authorization) if feed is None else feed.client
        return await client.explain(block_id)

    async def _address(self, exchange: Exchange) -> str:
        return await self._replicas.address_of(exchange.query_params.get("replica", ""))

    def _is_watched(self, address: str) -> bool:
        return any(it == address for it, _ in self._feeds)

    def _feed(self, key: tuple[str, str | None], caller: Caller) -> PoolFeed:
        if key in self._feeds:
            return self._feeds[key]
        num_callers = sum(address == key[0] for address, _ in self._feeds)
        if num_callers >= NUM_FEEDS_MAX:
            raise ResourceExhaustedError(
                "VIEWERS_FULL",
                f"{num_callers} callers look at the pool already; at most {NUM_FEEDS_MAX} may",
                num_callers=num_callers,
                num_callers_max=NUM_FEEDS_MAX,
            )
        feed = PoolFeed(
            caller,
            self._replicas.client(*key),
            self._clock,
            lambda: sample_stalls(self._readings(), self._clock.now_ns()),
        )
        self._feeds[key] = feed
        return feed

    def _caller(self, exchange: Exchange) -> tuple[str | None, Caller]:
        authorization = exchange.headers.get("authorization")
        return authorization, self._authenticator.caller(authorization)


def _told_to(caller: Caller, block: BlockExplanation) -> BlockExplanation:
    """One block, without what is not for the caller; the executor has taken that out before."""
    if caller.is_operator:
        return block
    return replace(
        block,
        tenant=block.tenant if block.tenant == caller.tenant else "",
        retentions=[it for it in block.retentions if it.tenant == caller.tenant],
    )
