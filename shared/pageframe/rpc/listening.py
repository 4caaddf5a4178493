"""Where a server listens: with TLS or without, and what is said of it at the start."""

import grpc
import structlog

from pageframe.core.errors import PreconditionError
from pageframe.rpc.channel import is_local, is_socket
from pageframe.rpc.tls import ServerTls
from pageframe.rpc.tls_serving import server_credentials

_log = structlog.get_logger(__name__)


def listen(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> str:
    """Have a gRPC server listen; returns the address with the port that it really has.

    Args:
        server: The server.
        address: ``HOST:PORT`` (port 0 picks a free one) or ``unix:/path``.
        tls: What it shows over TCP; None for plain text.

    Raises:
        PreconditionError: reason ADDRESS_IN_USE.
        InvalidRequestError: as ``ServerTls.read``.
    """
    is_plain = tls is None or is_socket(address)
    credentials = None if tls is None or is_plain else server_credentials(tls)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PreconditionError(
            "ADDRESS_IN_USE",
            f"cannot listen on {address}: it is taken, or not an address of this machine",
            address=address,
        ) from error
    bound = address if is_socket(address) else f"{address.rpartition(':')[0]}:{port}"
    if is_plain:
        warn_of_plain_text(bound)
    return bound


def warn_of_plain_text(address: str) -> None:
    """Say so where others than this machine may come, and anybody between could read along."""
    if not is_local(address):
        _log.warning(
            "plain_text",
            address=address,
            message=f"{address} can be reached from other machines and is not encrypted; "
            "give --tls-cert and --tls-key, or keep it on a private network",
        )
