"""Finds out why a server could not be reached, where TLS may be the reason.

gRPC says of most of it only that a socket was closed. Here the same is tried once more with
Python's own ``ssl``, which tells what the other side did not like. It costs one connection, after a
call has failed anyway.
"""

import socket
import ssl
from typing import Final

from pageframe.core.errors import PageframeError
from pageframe.rpc.channel import is_socket
from pageframe.rpc.tls import ClientTls
from pageframe.rpc.tls_files import read_identity

TIMEOUT_S: Final = 2.0


def find_tls_fault(address: str, tls: ClientTls | None, *, timeout_s: float = TIMEOUT_S) -> str:
    """One sentence on what is wrong between a caller and a server; empty where TLS is not it.

    Args:
        address: ``HOST:PORT``; there is nothing to find out of a Unix socket.
        tls: As it was called.
        timeout_s: Most time for each step.
    """
    if is_socket(address):
        return ""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
            if tls is None:
                return _fault_of_plain_text(connection, address)
            return _fault_of_tls(connection, address, tls.name or host, tls)
    except (OSError, ValueError, PageframeError):
        # Nobody is there: that is what the caller has been told.
        return ""


def _fault_of_plain_text(connection: socket.socket, address: str) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with context.wrap_socket(connection):
            pass
    except ssl.SSLError as error:
        # A server that wants a certificate has spoken TLS, too.
        if not _is_alert(error):
            return ""
    except OSError:
        return ""
    return (
        f"the server at {address} speaks TLS, and was called without; say by which CA it is known"
    )


def _fault_of_tls(connection: socket.socket, address: str, name: str, tls: ClientTls) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls.ca is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cafile=tls.ca)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if tls.cert is not None and tls.key is not None:
        read_identity(tls.cert, tls.key, is_server=False)
        context.load_cert_chain(tls.cert, tls.key)
    try:
        with context.wrap_socket(connection, server_hostname=name) as stream:
            # In TLS 1.3 a server looks at the caller's certificate after the caller is done; gRPC
            # says nothing then and hangs up. Whom it lets in it tells its HTTP/2 settings.
            return "" if stream.recv(1) else _turned_away(address, tls)
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of the server at {address} is refused: {error.verify_message}"
    except ssl.SSLEOFError:
        return _turned_away(address, tls)
    except ssl.SSLError as error:
        if _is_alert(error):
            return _turned_away(address, tls)
        return f"the server at {address} does not speak TLS"


def _turned_away(address: str, tls: ClientTls) -> str:
    if tls.cert is None:
        return f"the server at {address} asks callers for a certificate, and none was shown"
    return f"the server at {address} refuses the certificate that it was shown"


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the other side said it, in TLS."""
    return "ALERT" in str(error.reason or error).upper()
