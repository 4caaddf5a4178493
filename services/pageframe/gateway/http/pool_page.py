"""The pool page: ``/pool`` and what it asks for while somebody looks at it.

    /pool                the page; says nothing of the pool, so anybody may load it
    /pool/FILE           its scripts, styles and libraries, from the package
    /pool/events         how the pool is and what changes, as server-sent events; for a caller
    /pool/blocks/NUMBER  who holds one block, why and since when; for a caller

Callers are told apart as everywhere at this door. The page sends its key with ``fetch``, since a
browser's own reader of such events can send no header.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from starlette.routing import Route

from pageframe.client.kv_memory_aio import KvMemoryClients
from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError, NotFoundError, ResourceExhaustedError
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.gateway.http.exchange import Endpoint, Exchange, encode_json
from pageframe.gateway.http.pool_feed import PoolClient, PoolFeed
from pageframe.gateway.http.pool_stalls import sample_stalls
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading
from pageframe.wire.kv_memory import CAUSE_NAMES
from pageframe.wire.memory_facts import BLOCK_STATE_NAMES, BlockExplanation

NUM_VIEWERS_MAX: Final = 64
"""How many browsers may look at the same time; each is a connection."""

NUM_FEEDS_MAX: Final = 8
"""How many callers may look at the same time; each costs the executor a watch and its encoding."""

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
        executor_address: Where the executor listens.
        authenticator: Tells callers.
        clock: Source of time.
        readings: The gateway's metrics.
        make_client: Asks KV memory with an ``authorization`` header; by default over gRPC.
    """

    def __init__(
        self,
        executor_address: str,
        authenticator: Authenticator,
        clock: Clock,
        readings: Callable[[], Iterable[Reading]],
        make_client: Callable[[str | None], PoolClient] | None = None,
    ) -> None:
        self._clients = KvMemoryClients(executor_address)
        self._authenticator = authenticator
        self._clock = clock
        self._readings = readings
        self._make_client = make_client or self._clients.client
        self._feeds: dict[str | None, PoolFeed] = {}
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
            Route("/pool/events", Endpoint(self._events), methods=["GET"]),
            Route("/pool/blocks/{block_id}", Endpoint(self._block), methods=["GET"]),
            Route("/pool/{name}", Endpoint(self._file), methods=["GET"]),
        ]

    def close(self) -> None:
        """End all views, which never end by themselves."""
        for feed in self._feeds.values():
            feed.close()

    async def stop(self) -> None:
        """Let go of the executor."""
        self.close()
        await self._clients.close()

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

    async def _events(self, exchange: Exchange) -> None:
        authorization, caller = self._caller(exchange)
        if self.num_viewers >= NUM_VIEWERS_MAX:
            raise ResourceExhaustedError(
                "VIEWERS_FULL",
                f"{self.num_viewers} browsers look at the pool already; at most "
                f"{NUM_VIEWERS_MAX} may",
                num_viewers=self.num_viewers,
                num_viewers_max=NUM_VIEWERS_MAX,
            )
        feed = self._feed(authorization, caller)
        try:
            await exchange.while_connected(self._send_views(exchange, feed))
        finally:
            if not feed.num_viewers and self._feeds.get(authorization) is feed:
                del self._feeds[authorization]
                self._num_resets += feed.num_resets

    async def _send_views(self, exchange: Exchange, feed: PoolFeed) -> None:
        async with feed.joined():
            await exchange.begin_stream(_HEADERS)
            async for view in feed.views():
                await exchange.send_encoded(view)
            await exchange.end_stream()

    async def _block(self, exchange: Exchange) -> None:
        authorization, caller = self._caller(exchange)
        text = exchange.path_params["block_id"]
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise InvalidRequestError("FIELD_MALFORMED", f"{text[:40]!r} is no number of a block")
        if int(text) > _BLOCK_ID_MAX:
            raise NotFoundError("BLOCK_UNKNOWN", f"no pool has a block {text}", block_id=text)
        feed = self._feeds.get(authorization)
        client = self._make_client(authorization) if feed is None else feed.client
        explanation = await exchange.while_connected(client.explain(int(text)))
        await exchange.answer(200, encode_json(_explanation(explanation, caller)), _HEADERS)

    def _feed(self, authorization: str | None, caller: Caller) -> PoolFeed:
        feed = self._feeds.get(authorization)
        if feed is not None:
            return feed
        if len(self._feeds) >= NUM_FEEDS_MAX:
            raise ResourceExhaustedError(
                "VIEWERS_FULL",
                f"{len(self._feeds)} callers look at the pool already; at most {NUM_FEEDS_MAX} may",
                num_callers=len(self._feeds),
                num_callers_max=NUM_FEEDS_MAX,
            )
        feed = PoolFeed(
            caller,
            self._make_client(authorization),
            self._clock,
            lambda: sample_stalls(self._readings(), self._clock.now_ns()),
        )
        self._feeds[authorization] = feed
        return feed

    def _caller(self, exchange: Exchange) -> tuple[str | None, Caller]:
        authorization = exchange.headers.get("authorization")
        return authorization, self._authenticator.caller(authorization)


def _explanation(block: BlockExplanation, caller: Caller) -> dict[str, object]:
    """One block, without what is not for the caller; the executor has taken that out before."""
    is_own = caller.is_operator or block.tenant == caller.tenant
    return {
        "block_id": block.block_id,
        "state": BLOCK_STATE_NAMES[block.state],
        "references": block.num_references,
        "pins": block.num_pins,
        "indexed": block.is_indexed,
        "group": block.kv_group,
        "tenant": block.tenant if is_own else "",
        "sequence_ids": block.sequence_ids,
        "retentions": [
            {
                "name": it.name,
                "kind": it.kind.name.lower(),
                "expires": it.expire_ns // NANOSECONDS_PER_MILLISECOND,
            }
            for it in block.retentions
            if caller.is_operator or it.tenant == caller.tenant
        ],
        "operation": "" if block.operation is None else block.operation.span_name,
        "cause": "" if block.cause is None else CAUSE_NAMES[block.cause],
        "step": block.step,
        "since": block.time_ns // NANOSECONDS_PER_MILLISECOND,
    }
