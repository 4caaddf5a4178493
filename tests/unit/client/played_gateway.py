"""A gateway that says what the test says, over real gRPC, on a thread of its own."""

import contextlib
from concurrent import futures

import grpc

from pageframe.core.errors import PageframeError
from pageframe.rpc.status import to_rich_status
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc, sequence_pb2


class PlayedGateway(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Plays one script for each call: outputs, and an error to end with.

    Attributes:
        scripts: The next call plays the first; the last one is played for ever.
        requests: What was asked.
    """

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.metadata = []

    def Generate(self, request, context):  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        for step in script:
            if isinstance(step, PageframeError):
                context.abort_with_status(to_rich_status(step))
            yield step

    def Tokenize(self, request, context):  # noqa: N802
        kind = request.WhichOneof("input")
        return pb.TokenizeResponse(token_ids=[len(request.text)] if kind == "text" else [7])


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
def playing(*scripts):
    """Yields the gateway and its address."""
    gateway = PlayedGateway(*scripts)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield gateway, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
