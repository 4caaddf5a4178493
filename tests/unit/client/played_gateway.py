"""A gateway that says what the test says, over real gRPC, on a thread of its own."""

import asyncio
import contextlib
import queue
import threading
from concurrent import futures

import grpc

from pageframe.client import AsyncPageframeClient
from pageframe.core.errors import PageframeError
from pageframe.rpc.status import to_rich_status
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc, sequence_pb2
from unit.orders import each


class PlayedGateway(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Plays one script for each call: outputs, and an error or None to end with.

    Attributes:
        scripts: The next call plays the first; the last one is played for ever.
        requests: What was asked.
    """

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.metadata = []

    def Generate(self, request, context):  # noqa: N802
        for step in self._play(request, dict(context.invocation_metadata())):
            if isinstance(step, PageframeError):
                context.abort_with_status(to_rich_status(step))
            if step is None:
                return
            yield step

    def _play(self, request, metadata):
        self.requests.append(request)
        self.metadata.append(metadata)
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

    def Tokenize(self, request, context):  # noqa: N802
        kind = request.WhichOneof("input")
        return pb.TokenizeResponse(token_ids=[len(request.text)] if kind == "text" else [7])


class PlayedManyGateway(PlayedGateway):
    """Plays one script for each start on a stream of many, to its end before it reads on.

    An error ends the generation; an error in a tuple, and None, end the stream; an event is waited
    for.

    Attributes:
        orders: What came on streams.
    """

    def __init__(self, *scripts):
        super().__init__(*scripts)
        self.orders = queue.SimpleQueue()

    def GenerateMany(self, request_iterator, context):  # noqa: N802
        metadata = dict(context.invocation_metadata())
        yield pb.GenerateManyResponse()
        for order in each(request_iterator):
            self.orders.put(order)
            if not order.HasField("start"):
                continue
            for step in self._play(order.start.request, metadata):
                if step is None:
                    return
                if isinstance(step, tuple):
                    context.abort_with_status(to_rich_status(*step))
                if isinstance(step, threading.Event):
                    assert step.wait(20), "it never came"
                else:
                    part = _part(order.start.handle, step)
                    yield pb.GenerateManyResponse(parts=[part])
                if isinstance(step, PageframeError):
                    break


def _part(handle, step):
    part = pb.GeneratePart(handle=handle)
    if isinstance(step, PageframeError):
        part.failure.status, part.failure.reason = step.status, step.reason
        part.failure.message = step.message
        part.failure.limits.update(step.limits)
    else:
        kind = step.WhichOneof("message")
        getattr(part, kind).CopyFrom(getattr(step, kind))
    return part


def header(seed=5, num_prompt_tokens=3):
    return pb.GenerateResponse(
        header=pb.GenerateHeader(
            request_id="r", seed=seed, trace_id="ab" * 16, num_prompt_tokens=num_prompt_tokens
        )
    )


def delta(text, *token_ids, sample_index=0):
    return pb.GenerateResponse(
        delta=pb.OutputDelta(sample_index=sample_index, text=text, token_ids=token_ids)
    )


def end(num_tokens, sample_index=0, score=None, **account):
    return pb.GenerateResponse(
        completion=pb.Completion(
            sample_index=sample_index,
            finish_reason=sequence_pb2.FINISH_REASON_LENGTH,
            score=score,
            account=sequence_pb2.MemoryAccount(num_completion_tokens=num_tokens, **account),
        )
    )


@contextlib.contextmanager
def playing(*scripts, kind=PlayedGateway):
    """Yields the gateway and its address."""
    gateway = kind(*scripts)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield gateway, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def playing_many(*scripts):
    """As ``playing``, of a gateway that carries many generations on a stream."""
    return playing(*scripts, kind=PlayedManyGateway)


def run(address, scenario, **options):
    """Run a scenario, a coroutine function that takes an asynchronous client, to its end."""

    async def with_client():
        async with AsyncPageframeClient(address, **options) as client:
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(with_client())
