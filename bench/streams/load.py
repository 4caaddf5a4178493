"""Callers that always want more: so many streams at once, each followed by the next.

Messages are counted as bytes and not parsed but for the last of each stream, so that the callers
take as little as they can of the processors that they share with the system.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterable
from dataclasses import dataclass, field

import grpc

from pageframe.client.channel import channel_options
from pageframe.v1 import gateway_service_pb2 as pb

_Method = grpc.aio.UnaryStreamMultiCallable[pb.GenerateRequest, bytes]

_METHOD = "/pageframe.v1.GatewayService/Generate"
_NUM_CHANNELS = 8
_NUM_PROMPT_TOKENS = 8
# A stream may take a long time to get its turn, but not for ever.
_TIMEOUT_S = 600.0
# How long open streams may go on at the end before they are cut off.
_GRACE_S = 30.0
_NUM_GAPS_MAX = 200_000


@dataclass(slots=True)
class Tally:
    """What callers saw.

    Attributes:
        num_open: Streams that are open now.
        num_started: Streams that were asked for.
        num_ended: Streams that came to their end, all tokens there.
        num_cut: Streams that were cut off at the end.
        num_messages: Messages, over all streams.
        num_tokens: Output tokens of streams that ended.
        errors: Streams that did not end well, by what they ended with.
        gaps_s: A sample of seconds between two messages of a stream.
    """

    num_open: int = 0
    num_started: int = 0
    num_ended: int = 0
    num_cut: int = 0
    num_messages: int = 0
    num_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)


class Load:
    """Keeps streams open.

    Args:
        address: Of the gateway.
        num_streams: How many at once.
        num_output_tokens: Longest output; each stream asks for half of it to all of it.
        vocab_size: Token ids to draw prompts from.
        seed: Of what is drawn.
    """

    def __init__(
        self, address: str, *, num_streams: int, num_output_tokens: int, vocab_size: int, seed: int
    ) -> None:
        self._address = address
        self._num_streams = num_streams
        self._num_output_tokens = num_output_tokens
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._is_over = False
        self.tally = Tally()

    async def run(self, seconds: float) -> None:
        """Ask for as long as ``seconds``, then let the open streams end, within reason."""
        options = [*channel_options(self._address), ("grpc.use_local_subchannel_pool", 1)]
        channels = [
            grpc.aio.insecure_channel(self._address, options=options) for _ in range(_NUM_CHANNELS)
        ]
        callers = [
            asyncio.create_task(self._caller(channels[index % _NUM_CHANNELS]))
            for index in range(self._num_streams)
        ]
        try:
            done, _ = await asyncio.wait(
                callers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            self._is_over = True
            if not done:
                await asyncio.wait(callers, timeout=_GRACE_S)
            self.tally.num_cut = self.tally.num_open
        finally:
            for caller in callers:
                caller.cancel()
            endings = await asyncio.gather(*callers, return_exceptions=True)
            for channel in channels:
                await channel.close()
        for ending in endings:
            if isinstance(ending, Exception):
                raise ending

    async def _caller(self, channel: grpc.aio.Channel) -> None:
        call: _Method = channel.unary_stream(
            _METHOD, request_serializer=pb.GenerateRequest.SerializeToString
        )
        while not self._is_over:
            request = self._request()
            self.tally.num_started += 1
            self.tally.num_open += 1
            try:
                await self._read(call(request, timeout=_TIMEOUT_S), request.sampling.max_tokens)
            except grpc.RpcError as error:
                self.tally.errors[f"{error.code().name}: {error.details()}"] += 1
                # Who is refused does not ask again at once.
                await asyncio.sleep(1.0)
            finally:
                self.tally.num_open -= 1

    async def _read(self, stream: AsyncIterable[bytes], num_tokens: int) -> None:
        tally, last, before_s = self.tally, b"", 0.0
        async for message in stream:
            last, now_s = message, time.monotonic()
            tally.num_messages += 1
            if before_s and len(tally.gaps_s) < _NUM_GAPS_MAX:
                tally.gaps_s.append(now_s - before_s)
            before_s = now_s
        end = pb.GenerateResponse.FromString(last).completion
        if end.account.num_completion_tokens != num_tokens:
            tally.errors[f"{end.account.num_completion_tokens} of {num_tokens} tokens"] += 1
            return
        tally.num_ended += 1
        tally.num_tokens += num_tokens

    def _request(self) -> pb.GenerateRequest:
        dice = self._random
        request = pb.GenerateRequest()
        request.token_ids.ids.extend(
            dice.randrange(10, self._vocab_size) for _ in range(_NUM_PROMPT_TOKENS)
        )
        low = max(1, self._num_output_tokens // 2)
        request.sampling.max_tokens = dice.randint(low, self._num_output_tokens)
        request.sampling.ignore_eos = True
        request.sampling.temperature = 0.0
        return request
