"""Calls Pageframe's gateway with grpcio and the generated stubs alone.

    python stubs.py generate|cancel|refuse|expire HOST:PORT [API_KEY]

Prints one JSON object a line: what came, and how it ended.
"""

import json
import sys
import time
from collections.abc import Iterator

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc, sequence_pb2

Metadata = tuple[tuple[str, str], ...]
OPTIONS = [
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A gateway that comes back is wanted soon; by default gRPC waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # For addresses of one's own network.
    ("grpc.enable_http_proxy", 0),
]


def explain(error: grpc.RpcError) -> dict[str, object]:
    """Status, reason and numbers of a failed call; the reason is TRANSPORT if none was sent."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return {
                "status": error.code().name,
                "reason": info.reason,
                "limits": dict(info.metadata),
            }
    return {"status": error.code().name, "reason": "TRANSPORT", "limits": {}}


def generate(
    stub: gateway_service_pb2_grpc.GatewayServiceStub,
    request: pb.GenerateRequest,
    metadata: Metadata,
    deadline_s: float,
) -> Iterator[pb.GenerateResponse]:
    """Messages of one generation, over as many streams as it takes until the deadline.

    Raises:
        grpc.RpcError: as the server says.
    """
    name = request.request_id
    header: pb.GenerateHeader | None = None
    token_ids: list[int] = []
    is_whole = False
    attempt = 0
    while True:
        call = stub.Generate(request, timeout=deadline_s - time.monotonic(), metadata=metadata)
        try:
            for message in call:
                if message.HasField("header"):
                    if header is not None:
                        continue
                    header = message.header
                if message.HasField("delta"):
                    token_ids += message.delta.token_ids
                    # The rest of the text comes without tokens; twice, if the stream broke right
                    # behind it.
                    is_rest = not message.delta.token_ids
                    if is_rest and is_whole:
                        continue
                    is_whole = is_rest
                yield message
            return
        except grpc.RpcError as error:
            is_over = time.monotonic() > deadline_s
            if error.code() is not grpc.StatusCode.UNAVAILABLE or is_over:
                raise
            time.sleep(0.2)
        finally:
            # Whoever stops reading takes the request back; an ended call does not mind.
            call.cancel()
        attempt += 1
        # Another name: the broken stream's request may not be known to be dead yet.
        request.request_id = f"{name}~{attempt}"
        if header is not None:
            request.sampling.seed = header.seed
            request.resume_token_ids[:] = token_ids


def the_request() -> pb.GenerateRequest:
    """What is asked here."""
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, 8, 9]))
    request.sampling.max_tokens = 150
    request.sampling.seed = 1
    request.sampling.ignore_eos = True
    return request


def show(message: pb.GenerateResponse) -> None:
    """One line for each message."""
    if message.HasField("header"):
        header = message.header
        told: dict[str, object] = {"request_id": header.request_id, "seed": str(header.seed)}
    elif message.HasField("delta"):
        told = {"token_ids": list(message.delta.token_ids), "text": message.delta.text}
    else:
        name = sequence_pb2.FinishReason.Name(message.completion.finish_reason)
        told = {"finish_reason": name}
    print(json.dumps(told), flush=True)


def main(command: str, address: str, key: str = "") -> None:
    """Run one of the commands."""
    metadata: Metadata = (("authorization", f"Bearer {key}"),) if key else ()
    # With an OpenTelemetry span at hand: metadata += (("traceparent", "00-…-…-01"),)
    request, timeout_s = the_request(), 60.0
    if command == "generate":
        request.request_id = "a-whole-one"
    elif command == "cancel":
        request.request_id = "a-cancelled-one"
    elif command == "refuse":
        request.sampling.temperature = -1
    elif command == "expire":
        request.sampling.max_tokens, timeout_s = 3000, 0.5
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        is_cancelled = command != "cancel"
        try:
            for message in generate(stub, request, metadata, time.monotonic() + timeout_s):
                show(message)
                if message.HasField("delta") and not is_cancelled:
                    # Another process of the same tenant may do this, too.
                    name = pb.CancelRequest(request_id=request.request_id)
                    stub.Cancel(name, metadata=metadata)
                    is_cancelled = True
        except grpc.RpcError as error:
            print(json.dumps(explain(error)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
