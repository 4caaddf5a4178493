"""Asks a service whether it is serving, by the gRPC health protocol.

The protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
``lifecycle`` answers.
"""

from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S: Final = 4.0
"""Less than the images give a check, which has to start Python, too."""


def ask_health(address: str, *, timeout_s: float = TIMEOUT_S) -> str:
    """What a service says of itself: ``SERVING``, ``NOT_SERVING``, or why it could not be asked.

    Args:
        address: ``HOST:PORT`` or ``unix:/path``.
        timeout_s: How long to wait for the answer.
    """
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
