"""How a reply goes out: as a whole, or in pieces as they come.

    inputs ─▶ generations ─▶ pieces ─┬─ whole:   one JSON object
                                     └─ stream:  one event a piece, then usage, then [DONE]

Nothing is sent before the first piece is there. So a request that the scheduler refuses, because
its queue is full for example, is told so by a status code, in a stream as well.
"""

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.errors import rate_headers
from pageframe.gateway.http.exchange import SEED_HEADER, TRACE_ID_HEADER, Exchange, encode_json
from pageframe.gateway.http.generation_fields import Stream
from pageframe.gateway.http.pieces import Choices, Piece, gather
from pageframe.gateway.http.several import generate_all
from pageframe.gateway.output import Header, Output, RatesLeft
from pageframe.gateway.request import GenerateInput


class Form(Protocol):
    """How one endpoint says what a piece says."""

    id_prefix: str
    whole_object: str
    piece_object: str

    def whole(self, piece: Piece) -> dict[str, object]:
        """A choice, complete."""
        ...

    def pieces(self, piece: Piece) -> list[dict[str, object]]:
        """The choice's part in each event that a piece becomes; none if it says nothing."""
        ...


class Reply:
    """The reply to one request.

    Args:
        exchange: Where it goes.
        form: How it is said.
        choices: Makes the pieces.
        stream: Whether it comes in pieces.
        facts: Of the replica.
    """

    def __init__(
        self,
        exchange: Exchange,
        form: Form,
        choices: Choices,
        stream: Stream,
        facts: ReplicaFacts,
    ) -> None:
        self._exchange = exchange
        self._form = form
        self._choices = choices
        self._stream = stream
        self._headers: dict[str, str] = {}
        self._envelope = {
            "id": f"{form.id_prefix}-{exchange.request_id}",
            "object": form.piece_object if stream.is_on else form.whole_object,
            "created": int(time.time()),
            "model": facts.model,
            "system_fingerprint": fingerprint(facts),
        }

    async def send(self, service: GenerationService, inputs: Sequence[GenerateInput]) -> None:
        """Run the generations and send what they say.

        Raises:
            PageframeError: refused, failed, cancelled or too late.
        """
        generations = generate_all(service, inputs, self._exchange.trace_context)
        async with (
            contextlib.aclosing(generations),
            contextlib.aclosing(self._notice(generations)) as outputs,
        ):
            if self._stream.is_on:
                await self._send_pieces(outputs)
            else:
                await self._send_whole(outputs, len(inputs) * inputs[0].num_samples)

    async def _notice(
        self, outputs: AsyncGenerator[tuple[int, Output], None]
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """Passes outputs on; what the first header tells goes into the reply's."""
        async for prompt_index, output in outputs:
            if isinstance(output, Header) and not self._headers:
                self._headers[SEED_HEADER] = str(output.seed)
                if output.trace_id:
                    self._headers[TRACE_ID_HEADER] = output.trace_id
            if isinstance(output, RatesLeft):
                # Of several prompts the one that was let in last tells what is left.
                self._headers |= rate_headers(output.levels)
            yield prompt_index, output

    async def _send_whole(
        self, outputs: AsyncGenerator[tuple[int, Output], None], num_choices: int
    ) -> None:
        whole = await gather(outputs, self._choices, num_choices)
        reply = self._envelope | {
            "choices": [self._form.whole(piece) for piece in whole],
            "usage": self._choices.usage.form(),
        }
        await self._exchange.answer(200, encode_json(reply), self._headers)

    async def _send_pieces(self, outputs: AsyncGenerator[tuple[int, Output], None]) -> None:
        is_begun = False
        usage: dict[str, object] = {"usage": None} if self._stream.includes_usage else {}
        async for prompt_index, output in outputs:
            piece = self._choices.piece(prompt_index, output)
            if piece is None:
                continue
            if not is_begun:
                await self._exchange.begin_stream(self._headers)
                is_begun = True
            for choice in self._form.pieces(piece):
                await self._exchange.send_event(self._envelope | {"choices": [choice]} | usage)
        if self._stream.includes_usage:
            usage = {"choices": [], "usage": self._choices.usage.form()}
            await self._exchange.send_event(self._envelope | usage)
        await self._exchange.end_stream()


def fingerprint(facts: ReplicaFacts) -> str:
    """Names what has to be equal for the same seed to bring the same tokens."""
    parts = (facts.model, facts.runner, facts.device, facts.dtype, facts.kv_dtype)
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
