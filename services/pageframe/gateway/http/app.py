"""The door's routes: which path is answered by what."""

import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError, NotFoundError, PageframeError
from pageframe.core.replica import ReplicaFacts
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http import chat_completions, completions
from pageframe.gateway.http.errors import ErrorForm, http_code
from pageframe.gateway.http.exchange import (
    REQUEST_ID_HEADER,
    Endpoint,
    Exchange,
    encode_json,
    request_id_of,
)
from pageframe.gateway.http.generation_fields import Origin
from pageframe.gateway.http.pool_page import PoolPage
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.telemetry.metrics_door import CONTENT_TYPE


class Door:
    """What is behind each path.

    Args:
        service: Does the work.
        authenticator: Tells tenants.
        clock: Source of time.
        metrics: All metrics of the process as Prometheus text.
        pool: The page that shows the block pool; None for none.
        count_replicas: How many replicas take requests, and how many there are.
    """

    def __init__(
        self,
        service: GenerationService,
        authenticator: Authenticator,
        clock: Clock,
        metrics: Callable[[], bytes],
        pool: PoolPage | None = None,
        count_replicas: Callable[[], tuple[int, int]] = lambda: (1, 1),
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._clock = clock
        self._metrics = metrics
        self._pool = pool
        self._count_replicas = count_replicas
        self._start_s = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        chat = Endpoint(self._chat, chat_completions.ERROR_FORM)
        completion = Endpoint(self._completion, completions.ERROR_FORM)
        routes = [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", Endpoint(self._models), methods=["GET"]),
            Route("/v1/models/{model:path}", Endpoint(self._model), methods=["GET"]),
            Route("/health", Endpoint(self._health), methods=["GET"]),
            Route("/metrics", Endpoint(self._read_metrics), methods=["GET"]),
            *(() if self._pool is None else self._pool.routes()),
        ]
        app = Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})
        app.router.redirect_slashes = False
        return app

    async def _chat(self, exchange: Exchange) -> None:
        origin = self._origin(exchange)
        ask = chat_completions.read_chat(await exchange.read_body(), origin)
        await exchange.while_connected(chat_completions.send_chat(exchange, ask, self._service))

    async def _completion(self, exchange: Exchange) -> None:
        origin = self._origin(exchange)
        ask = completions.read_completion(await exchange.read_body(), origin)
        await exchange.while_connected(completions.send_completion(exchange, ask, self._service))

    async def _models(self, exchange: Exchange) -> None:
        self._caller(exchange)
        models = [self._describe(facts) for facts in self._service.served]
        await exchange.answer(200, encode_json({"object": "list", "data": models}))

    async def _model(self, exchange: Exchange) -> None:
        self._caller(exchange)
        model = exchange.path_params["model"]
        if not model:
            raise NotFoundError("UNKNOWN_MODEL", "the path ends where a model's name belongs")
        facts = self._service.facts_of(model)
        await exchange.answer(200, encode_json(self._describe(facts)))

    async def _health(self, exchange: Exchange) -> None:
        """Whether requests are taken; for load balancers, so without a key."""
        if self._service.is_draining:
            await exchange.answer(503, encode_json({"status": "draining"}))
            return
        num_open, num_known = self._count_replicas()
        answer = {
            "status": "serving",
            "model": self._service.facts.model,
            "replicas": {"healthy": num_open, "known": num_known},
        }
        await exchange.answer(200, encode_json(answer))

    async def _read_metrics(self, exchange: Exchange) -> None:
        """They name tenants, so where there are keys they are for operators."""
        self._caller(exchange).check_operator("reading metrics")
        await exchange.answer(200, self._metrics(), content_type=CONTENT_TYPE)

    def _describe(self, facts: ReplicaFacts) -> dict[str, object]:
        return {
            "id": facts.model,
            "object": "model",
            "created": self._start_s,
            "owned_by": "pageframe",
            "max_model_len": facts.max_model_len,
        }

    def _caller(self, exchange: Exchange) -> Caller:
        return self._authenticator.caller(exchange.headers.get("authorization"))

    def _origin(self, exchange: Exchange) -> Origin:
        tenant = self._caller(exchange).tenant
        timeout_ms = exchange.timeout_ms()
        now_ns = self._clock.now_ns()
        return Origin(
            tenant=tenant,
            request_id=exchange.request_id,
            deadline_ns=(
                0 if timeout_ms is None else now_ns + timeout_ms * NANOSECONDS_PER_MILLISECOND
            ),
        )


def _no_route(request: Request, exception: Exception) -> Response:
    """Starlette's own refusals, in the one form of errors."""
    where = f"{request.method} {request.url.path}"[:200]
    error: PageframeError = NotFoundError("UNKNOWN_URL", f"there is nothing at {where}")
    headers = {REQUEST_ID_HEADER: request_id_of(request.headers)}
    if isinstance(exception, HTTPException):
        headers |= exception.headers or {}
        if exception.status_code == 405:
            error = InvalidRequestError("METHOD_NOT_ALLOWED", f"{where} is not allowed")
    return Response(
        encode_json(ErrorForm().body(error)),
        http_code(error),
        headers=headers,
        media_type="application/json",
    )
